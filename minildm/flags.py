"""What the command lines share."""

import argparse


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """--help with each flag's default, where it has one and its text does not tell it."""

    def _get_help_string(self, action):
        told = action.default in (None, False) or "(default" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


def at_least(least):
    """An argparse type: whole numbers from ``least`` on, of 64 bits."""
    def number(text):
        value = int(text)
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"must be at least {least} and below 2^63, got {text}")
        return value

    number.__name__ = "whole number"  # argparse names it where int() fails
    return number
