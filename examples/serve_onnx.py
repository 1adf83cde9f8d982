"""Serve an exported model without PyTorch: python serve_onnx.py model.onnx photo.jpg [class whose map is wanted]"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

onnxruntime.set_default_logger_severity(3)  # it would warn that the input "target" may be left out
session = onnxruntime.InferenceSession(sys.argv[1])
told = session.get_modelmeta().custom_metadata_map
config, names = json.loads(told["preprocessing"]), json.loads(told["class_names"])
if config["crop_mode"] != "center":
    sys.exit(f"this example crops the centre, but the model wants crop_mode={config['crop_mode']!r}")
channels, *cut = config["input_size"]  # height and width of what the model sees: the middle of the resized image
image = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("L" if channels == 1 else "RGB")
size = [int(int(cut[0] / config["crop_pct"]) * side / min(image.size)) for side in image.size]
image = image.resize(size, Image.Resampling[config["interpolation"].upper()])
left, top = round((size[0] - cut[1]) / 2), round((size[1] - cut[0]) / 2)
pixels = np.float32(image.crop((left, top, left + cut[1], top + cut[0]))).reshape(*cut, channels) / np.float32(255)
images = ((pixels - np.float32(config["mean"])) / np.float32(config["std"])).transpose(2, 0, 1)[None]
chosen = {"target": np.array([names.index(sys.argv[3])])} if len(sys.argv) > 3 else {}
logits, evidence, heat = session.run(["logits", "evidence", "map"], {"images": images} | chosen)
print(names[logits[0].argmax()], "evidence", dict(zip(names, evidence[0].tolist(), strict=True)), "peak", heat[0].max())
