"""Everything that changes while training, and what of it a saved state holds."""

import contextlib

import torch

from minildm.optimizer import MovingAverage

FP16_SCALE = 2.0**16  # initial scale of the loss, so that small gradients survive float16
FP16_PATIENCE = 2000  # good steps before the scale doubles


class State:
    NUMBERS = ("step", "best", "bad_steps", "skipped", "loss_scale", "good_steps", "seconds", "ended")

    def __init__(self, method, config):
        self.method = method
        self.step = 0
        self.trained = method.trained()  # {name: parameter}, in the optimizer's order
        self.optimizer = method.optimizer(config, self.trained)
        self.average = MovingAverage(config.ema_decay)
        self.average.add(self.trained)
        self.best = None  # (validation loss, step)
        self.bad_steps, self.skipped = 0, 0  # in a row; in all
        assert all(p.dtype == torch.float32 for p in self.trained.values()), "trained weights must be float32"
        in_float16 = any(p.dtype == torch.float16 for p in method.model.parameters())
        self.loss_scale = FP16_SCALE if in_float16 else 1.0
        self.good_steps = 0  # since the last bad step
        self.seconds = 0.0  # of training, over all sessions
        self.ended = 0  # the last step for which the run has done all that belongs to its end

    @contextlib.contextmanager
    def averaged(self):
        """Inside, the model has its averaged weights, where there is an average."""
        self.average.swap(self.trained)
        try:
            yield
        finally:
            self.average.swap(self.trained)

    def adjust_loss_scale(self, good):
        """float16 only: halve the scale after an overflow, double it after many good steps."""
        self.good_steps = self.good_steps + 1 if good else 0
        if not good:
            self.loss_scale = max(self.loss_scale / 2, 2.0)
        elif self.good_steps % FP16_PATIENCE == 0:
            self.loss_scale *= 2

    def state_dict(self):
        return {name: getattr(self, name) for name in self.NUMBERS} | {
            "method": self.method.state_dict(),
            "trained": {name: parameter.detach() for name, parameter in self.trained.items()},
            "average": dict(self.average.values),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state, config):
        """Raises: LookupError, TypeError, ValueError, AttributeError or RuntimeError for the state of another run."""
        state = {"ended": 0} | state  # those of earlier versions do not say
        _check_numbers(state)
        self.method.load_state_dict(state["method"])
        parameters = self.method.trained()
        self.trained = {name: parameters[name] for name in state["trained"]}  # the order they were added in
        if missing := sorted({*parameters} - {*self.trained}):
            raise ValueError(f"no {missing[0]}")
        for name, values in (*state["trained"].items(), *state["average"].items()):
            if values.shape != self.trained[name].shape:  # one number would be copied to all
                raise ValueError(f"{name} is {tuple(values.shape)}, expected {tuple(self.trained[name].shape)}")
        for name, values in state["trained"].items():
            self.trained[name].data.copy_(values)
        self.average.values = {name: values.to(self.trained[name].device) for name, values in state["average"].items()}
        self.optimizer = self.method.optimizer(config, self.trained)
        self.optimizer.load_state_dict(state["optimizer"])
        for name in self.NUMBERS:
            setattr(self, name, state[name])


def _check_numbers(state):
    for name in State.NUMBERS:
        value, kinds = state[name], (int, float) if name in ("loss_scale", "seconds") else int
        if name == "best":
            wrong = value is not None and [type(part) for part in value] != [float, int]
        else:
            wrong = not isinstance(value, kinds) or isinstance(value, bool) or not 0 <= value < float("inf")
        if wrong:
            raise ValueError(f"{name} is {value}")
