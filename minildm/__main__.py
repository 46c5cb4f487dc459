"""``python -m minildm <command>``: every tool but training and sampling.

Each command is a function that imports what it needs, so that none waits for another's libraries. Its docstring is its
line in the usage text.
"""

import sys

from minildm import __version__
from minildm.errors import InputError, exit_cleanly
from minildm.startup import prepare_process
from minildm.torchrun import launched


def check(arguments):
    """read every image of a data set, as training would, and report what is wrong"""
    from minildm.data.check import main

    return main(arguments)


def prompts(arguments):
    """show the prompts of a data set"""
    from minildm.data.check import show_prompts

    return show_prompts(arguments)


def fid(arguments):
    """compare two sets of images: FID, KID, precision, recall, and how far to trust them"""
    from minildm.metrics.fid_score import main

    return main(arguments)


def clip_score(arguments):
    """score how well images match their prompts, according to a CLIP model"""
    from minildm.metrics.clip import main

    return main(arguments)


def audit(arguments):
    """look for generated images that copy training images"""
    from minildm.metrics.audit import main

    return main(arguments)


def adherence(arguments):
    """count how often images show what their prompts ask for"""
    from minildm.metrics.adherence import main

    return main(arguments)


def compare(arguments):
    """train, sample and evaluate methods on one data set: tables and figures of a paper"""
    from minildm.report.compare import main

    return main(arguments)


def report(arguments):
    """write one HTML file about one or several runs"""
    from minildm.report.page import main

    return main(arguments)


def rare_tokens(arguments):
    """list rare words for DreamBooth's instance prompt"""
    from minildm.training.rare_tokens import main

    return main(arguments)


def fetch(arguments):
    """get published weights: Stable Diffusion, autoencoder, Inception, CLIP"""
    from minildm.fetch import main

    return main(arguments)


def info(arguments):
    """show what a checkpoint, autoencoder or adapter file holds"""
    from minildm.tools.info import main

    return main(arguments)


def merge(arguments):
    """merge adapters into a full checkpoint"""
    from minildm.tools.merge import main

    return main(arguments)


def convert(arguments):
    """write an adapter for another tool: ComfyUI, A1111, diffusers"""
    from minildm.tools.convert import main

    return main(arguments)


def shrink(arguments):
    """lower an adapter's rank, keeping as much of its change as possible"""
    from minildm.tools.shrink import main

    return main(arguments)


def pretrain(arguments):
    """train a latent diffusion model from scratch: autoencoder, text encoder, U-Net"""
    from minildm.pretraining.command import main

    return main(arguments)


COMMANDS = {
    "check": check,
    "prompts": prompts,
    "fid": fid,
    "clip-score": clip_score,
    "audit": audit,
    "adherence": adherence,
    "compare": compare,
    "report": report,
    "info": info,
    "convert": convert,
    "merge": merge,
    "shrink": shrink,
    "rare-tokens": rare_tokens,
    "fetch": fetch,
    "pretrain": pretrain,
}

SHARED = ("fid", "audit", "compare")  # those whose work several processes share


def usage():
    lines = [f"  {name:<12} {function.__doc__}" for name, function in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m minildm COMMAND ...",
            "       python -m minildm COMMAND --help    the options of a command",
            "       python -m minildm --version",
            "",
            "commands:",
            *lines,
            "",
            "Training and sampling have their own scripts: python train.py --help, python sample.py --help",
        ]
    )


def main(arguments):
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"minildm {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"error: unknown command {arguments[0]!r}; choose one of: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if launched() and arguments[0] not in SHARED:
        raise InputError(f"{arguments[0]} works in one process; start it without torchrun (train.py, sample.py and "
                         f"{', '.join(SHARED)} share their work among several)")  # fmt: skip
    return COMMANDS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    prepare_process()
    exit_cleanly(main, sys.argv[1:])
