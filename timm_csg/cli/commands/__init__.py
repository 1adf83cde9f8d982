"""The commands of ``timm-csg``: their options, and what they print. What they do lies in the modules of the same names.

Every command offers ``SUMMARY``, ``DESCRIPTION``, ``add_arguments(parser)`` and ``run(args)``; where there is
``epilog()``, it makes the text below the options of its help.
"""

from types import ModuleType

from timm_csg.cli.commands import evaluate, explain, export, inspect, push, report, train

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "evaluate": evaluate,
    "inspect": inspect,
    "explain": explain,
    "export": export,
    "report": report,
    "push": push,
}
