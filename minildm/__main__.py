"""``python -m minildm <command>``: the smaller tools. Each command is a function here that imports what it needs."""

import os
import sys

from minildm.errors import exit_cleanly


def check(arguments):
    """decode and examine a data set before training on it"""
    from minildm.data.check import main

    return main(arguments)


def prompts(arguments):
    """show the prompts a data set gives"""
    from minildm.data.check import show_prompts

    return show_prompts(arguments)


def fid(arguments):
    """Frechet distance of two folders of pictures, and what it is worth at this n"""
    from minildm.metrics.fid_score import main

    return main(arguments)


def clip_score(arguments):
    """how well pictures agree with their prompts, in the eyes of a CLIP model"""
    from minildm.metrics.clip import main

    return main(arguments)


def audit(arguments):
    """has the model memorised its training pictures?"""
    from minildm.metrics.audit import main

    return main(arguments)


def pretrain(arguments):
    """train a latent diffusion model from nothing: autoencoder, text encoder, U-Net"""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy draws small pictures; its threads would fight torch's
    from minildm.pretraining.command import main

    return main(arguments)


COMMANDS = {
    "check": check,
    "prompts": prompts,
    "fid": fid,
    "clip-score": clip_score,
    "audit": audit,
    "pretrain": pretrain,
}


def usage():
    lines = [f"  {name:<12} {function.__doc__.strip().splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join(["usage: python -m minildm <command> [--help]", "", *lines])


def main(arguments):
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] not in COMMANDS:
        print(f"error: unknown command {arguments[0]!r}; one of: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return COMMANDS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    exit_cleanly(main, sys.argv[1:])
