"""Parsing, encodings, names as plain text, and commands that are stopped."""

import io
import logging
import os
import signal
import subprocess
import sys

import pytest
import torch

from timm_csg.__main__ import run
from timm_csg.cli import main
from timm_csg.cli.commands import COMMANDS
from timm_csg.cli.terminal import Stopped, any_encoding, make_console, say, stoppable


@pytest.mark.parametrize(
    ("arguments", "alike"), [(["train", "--epoks", "3"], "--epochs"), (["evaluate", "x", "--jsno"], "--json")]
)
def test_an_unknown_option_names_the_one_spelled_alike(arguments, alike, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"Did you mean {alike!r}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--lr", "x"], "timm-csg train: --lr expects a number, but found 'x'; see timm-csg train --help."),
        (["train", "--epochs", "1.5"], "--epochs expects a whole number, but found '1.5'; see"),
        (["train", "--scale", "0.5", "much"], "--scale expects a number, but found 'much'; see"),
        (["evaluate", "x", "--attack-images", "some"], "--attack-images expects a whole number, but found 'some'; see"),
        (["train", "--freeze", "all"], "--freeze: invalid choice: 'all' (choose from 'none'"),
        (["inspect"], "timm-csg inspect: the following arguments are required: model; see timm-csg inspect --help."),
        ([], "timm-csg: the following arguments are required: COMMAND; see timm-csg --help."),
    ],
)
def test_a_wrong_option_is_one_line_without_all_the_others(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_what_huggingface_hub_says_is_not_repeated_by_our_log(monkeypatch):
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    main(["inspect", "no_such_model"])
    assert not logging.getLogger("huggingface_hub").propagate


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_in_one_line_when_it_is_interrupted(name, monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS[name], "run", stop)
    arguments = {"explain": ["x", "--checkpoint", "x"], "push": ["x", "y"], "train": []}.get(name, ["x"])
    assert main([name, *arguments]) == 130
    assert capsys.readouterr().err == "stopped.\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_stop_does_not_disturb_the_end(number, monkeypatch, capsys, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def stopped_again(text):
        os.kill(os.getpid(), number)
        say(text)

    monkeypatch.setattr("timm_csg.cli._say", stopped_again)
    monkeypatch.setattr(COMMANDS["inspect"], "run", lambda args: os.kill(os.getpid(), signal.SIGINT))
    assert main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "stopped.\n"


def test_ctrl_c_while_the_command_is_loaded_is_one_line(monkeypatch, capsys):
    class Loading:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "timm_csg.cli", Loading())
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit, match="130"):
            run()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # no traceback while Python ends
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "stopped.\n"


def test_sigterm_stops_a_command_and_is_told_from_ctrl_c(monkeypatch, capsys):
    monkeypatch.setattr(COMMANDS["inspect"], "run", lambda args: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["inspect", "x"]) == 143
    assert capsys.readouterr().err == "stopped.\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_there_is_so_far_is_told_with_the_status_of_the_stop():
    with stoppable(), pytest.raises(Stopped) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    told = Stopped.after(stop.value, "half of it is done.")
    assert (str(told), told.status) == ("stopped; half of it is done.", 143)
    assert Stopped.after(KeyboardInterrupt(), "nothing").status == 130


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("ascii", b"a - \\u4e2d +-1 +\n"),
        ("latin-1", b"a - \\u4e2d \xb11 +\n"),
        ("utf-8", "a – 中 ±1 †\n".encode()),
    ],
)
def test_any_encoding_takes_any_text(encoding, text, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with any_encoding():
        make_console().print("a – 中 ±1 †")
        sys.stdout.flush()
    assert raw.getvalue() == text
    assert sys.stdout.errors == "strict"


def test_names_that_are_not_utf8_are_written_as_escapes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    with any_encoding():
        make_console().print("caf\udce9")
        sys.stdout.flush()
    assert raw.getvalue() == b"caf\\udce9\n"


def test_the_console_takes_names_as_they_are(capsys):
    make_console().print("[red]cat[/red] :cat: [/]")
    assert capsys.readouterr().out == "[red]cat[/red] :cat: [/]\n"


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m timm_csg inspect test_resnet test_resnet | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "lower --batch-size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "lower --batch-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "exited unexpectedly"),
        (MemoryError(), "out of memory"),
    ],
)
def test_limits_of_the_machine_are_one_sentence(error, said, monkeypatch, capsys):
    def fail(args):
        raise error

    monkeypatch.setattr(COMMANDS["inspect"], "run", fail)
    assert main(["inspect", "x"]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_faults_of_the_package_keep_their_traceback(monkeypatch):
    def fail(args):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(COMMANDS["inspect"], "run", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        main(["inspect", "x"])


def test_a_run_folder_of_a_command_that_fails_at_once_is_not_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--device", "cuda:99"]) == 2
    assert main(["evaluate", "nothing", "--data", "digits"]) == 2
    assert list(tmp_path.glob("runs/*")) == []
