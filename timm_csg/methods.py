"""What the model card says of each method, and how to cite it."""

from typing import NamedTuple


class Method(NamedTuple):
    """A mechanism in words.

    Attributes:
        words: After "trained with".
        citation: BibTeX; empty for our own.
    """

    words: str
    citation: str = ""


METHODS = {
    "assigned": Method(
        "assigned filters: every filter of the last stage belongs to a class and has learned to name it by itself",
    ),
    "csg": Method(
        "a class-specific gate (CSG): every filter of the last stage has learned to serve about one class",
        """@inproceedings{liang2020training,
  title = {Training Interpretable Convolutional Neural Networks by Differentiating Class-specific Filters},
  author = {Liang, Haoyu and Ouyang, Zhihao and Zeng, Yuyuan and Su, Hang and He, Zihao and Xia, Shu-Tao and Zhu, Jun
    and Zhang, Bo},
  booktitle = {European Conference on Computer Vision (ECCV)},
  pages = {622--638},
  year = {2020},
  url = {https://arxiv.org/abs/2007.08194}
}""",
    ),
    "icnn": Method(
        "interpretable filters (ICNN): every filter of the last stage has learned to answer to one part of an object",
        """@inproceedings{zhang2018interpretable,
  title = {Interpretable Convolutional Neural Networks},
  author = {Zhang, Quanshi and Wu, Ying Nian and Zhu, Song-Chun},
  booktitle = {Conference on Computer Vision and Pattern Recognition (CVPR)},
  pages = {8827--8836},
  year = {2018},
  url = {https://arxiv.org/abs/1710.00935}
}""",
    ),
    "picnn": Method(
        "an interpretation pathway (PICNN): each filter of the last stage has learned how probably it serves a class",
        """@inproceedings{guo2024picnn,
  title = {PICNN: A Pathway towards Interpretable Convolutional Neural Networks},
  author = {Guo, Wengang and Yang, Jiayi and Yin, Huilin and Chen, Qijun and Ye, Wei},
  booktitle = {AAAI Conference on Artificial Intelligence},
  year = {2024},
  url = {https://arxiv.org/abs/2312.12068}
}""",
    ),
}
