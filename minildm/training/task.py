"""What the training loop knows about a task: where its samples come from, and what a sample's loss is."""


class Task:
    """Base of the tasks: fine-tuning (finetune.py), and each stage of pretraining.

    Attributes:
        batch_size: B, samples per step over all processes and micro-batches.
        validation_interval: steps between validations; None: there is nothing to validate on.

    A batch is a dict of tensors and lists with one entry per sample. Two entries are always there:
        id (B,) int64: step * B + position. All randomness of a sample is a function of the run's seed and its id, so
            batches may be cut in any way.
        weight (B,) float32: the step's loss is sum_i weight_i loss_i / B; ordinary weights are 1.
    """

    batch_size = None
    validation_interval = None

    def begin(self):
        """Called before the first step of a run, and of a resumed one, with the weights that it begins with."""

    def batches(self, first_step, last_step):
        """The batches of the steps [first_step, last_step)."""
        raise NotImplementedError

    def losses(self, batch):
        """The loss of each sample of a batch, or of a part of it: (b,) float32."""
        raise NotImplementedError

    def halves(self, batch):
        """[batch], or its two halves, where computing their gradients at the same time is faster."""
        return [batch]

    def validate(self):
        """The validation loss, a float: the same samples, timesteps and noise at every call."""
        raise NotImplementedError

    def sample_sheet(self, path):
        """Write images that show the state of training to ``path``, a PNG."""
