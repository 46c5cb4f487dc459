"""The seam between the training loop and a fine-tuning method: all that the loop knows about one.

A method decides which parameters are trained and what happens to them besides a step of the optimizer. The loop makes
one step like this (training/loop.py):

    with method.watch(step):                      # SeLoRA measures here
        loss of each micro-batch, backward
    sum gradients and method.statistics() over processes
    method.penalty(), backward                    # AdaLoRA's orthogonality: once per step, the same in every process
    clip; optimizer.step(lr)
    method.update(step, optimizer)                # SeLoRA grows here, AdaLoRA prunes

On a CPU, forward and backward of a small network may run in two threads at once, each on half of the batch. They do not
in steps for which `statistics` returns something: a method that adds up what it sees in hooks must return it there.

To add a method, write one file with a frozen `Settings` dataclass (its fields are the method's flags) and a subclass of
`Method`, then name it in ``METHODS`` (adapters/__init__.py). Nothing else changes. `full.py` is the shortest example.
"""

import contextlib

from minildm.errors import InputError
from minildm.optimizer import AdamW
from minildm.settings import Settings


class Method:
    """Base of the methods, and the defaults: train all parameters that require gradients, change nothing else.

    Class attributes:
        settings_class: the frozen dataclass with the method's settings.
        defaults: {training setting: value} that suit the method better than TrainingConfig's own defaults.
        float32_weights: load the base in float32, and use the run's precision for products only (autocast).
        result: name of the file or folder in the run's folder that `save` writes.
        compiled: whether the networks are compiled, so that a change of shapes is expensive; set by the caller.
        can_freeze_text_encoder: whether the text encoder may stay out of the steps at --text-encoder-rate 0.
        reads_captions: whether --read-captions suits the method.
        follows_end: names of schedules that depend on the number of steps, for a resumed run that gets another.
    """

    settings_class = Settings
    defaults = {}
    float32_weights = False
    result = "adapter.safetensors"
    compiled = False
    can_freeze_text_encoder = True
    reads_captions = True
    follows_end = ()

    def __init__(self, model, settings, steps, seed):
        """Wrap or unfreeze layers of ``model`` (a LatentDiffusion); its output does not change.

        Args: settings: of ``settings_class``. steps: of the whole run. seed: of the new parameters.
        """
        self.model, self.settings, self.steps, self.seed = model, settings, steps, seed

    @classmethod
    def check_fit(cls, model, settings):
        """Raise InputError for settings that do not fit the model, which a new method would raise, too: for checks
        before hours of work on images."""

    def trained(self):
        """{name: parameter} of what is trained, in the model's order. Read again after an `update` that changed it."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def rate(self, name):
        """Factor of the learning rate for the parameter called ``name``."""
        return 1.0

    def optimizer(self, config, trained):
        """The optimizer of ``trained``, {name: parameter}: minildm's AdamW, or another with its interface."""
        return AdamW(list(trained.values()), [self.rate(name) for name in trained], weight_decay=config.weight_decay)

    def watch(self, step):
        """Context manager around all forward and backward passes of step ``step`` (0, 1, ...); not of validation."""
        return contextlib.nullcontext()

    penalty = None  # or a method () -> a scalar, which is added to the loss once per step of the optimizer

    def statistics(self):
        """Tensors to sum over processes, in place, together with the gradients."""
        return []

    def update(self, step, optimizer):
        """Change what is trained, after the optimizer has taken step ``step``; the gradients are still there.

        Returns: a dict to log. It must not be empty if `trained` or the optimizer's rows have changed: only then does
        the loop look at them again.
        """
        return {}

    def may_be_best(self, step):
        """Whether the weights after ``step`` steps may be kept as the run's best."""
        return True

    def finish(self, validate):
        """What only the end can tell, at the last step and on averaged weights, where there is an average.

        Args: validate: () -> validation loss, or None. Returns: a dict to log.
        """
        return {}

    def describe(self):
        """Lines for the run's summary: what is trained, and how large."""
        return [f"{sum(p.numel() for p in self.trained().values()):,} parameters trained"]

    def state_dict(self):
        """What an exact continuation needs besides the trained parameters."""
        return {}

    def load_state_dict(self, state):
        """Restore `state_dict`; afterwards `trained` gives the parameters of the saved state."""

    def save(self, path, about):
        """Write what was trained to ``path``, whole or not at all. ``about``: a dict to record beside it."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is saved")

    def export(self, path, format):
        """Write what was trained for another tool, as `save` does. ``format``: "kohya" or "diffusers"."""
        raise InputError(f"{type(self).__name__} trains no adapter, so there is nothing to write as {format}")
