"""The Inception-v3 of the FID: images in, features at four depths out.

The weights are TensorFlow's ``inception-2015-12-05`` in the layout of pytorch-fid's file. That network differs from
the Inception-v3 of Szegedy et al. 2015 (arXiv:1512.00567) and of torchvision in three places, each marked FID below:
its average pools do not count the padding, its last mixed block pools by maximum, and it has 1008 classes.
Parameter names are those of the file. Inference only: batch norms are folded into their convolutions on loading.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from minildm.checkpoint.recognise import why_no_match
from minildm.checkpoint.tensors import TensorFile
from minildm.errors import InputError

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_BYTES = 95_628_359
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_NAME}"
DIMS = (64, 192, 768, 2048)
COUNTER = ".num_batches_tracked"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SIZE = 299  # pixels a side


class Conv(nn.Module):
    """Convolution, batch norm, ReLU. ``padding="same"`` keeps H and W (stride 1)."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)  # TensorFlow's eps, not torch's 1e-5

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self):
        """Fold the batch norm's fixed scale and shift into the convolution: equal up to rounding, and faster."""
        self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


def average_pool(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)  # FID: padding is not counted


def max_pool(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


class MixedA(nn.Module):
    """35 x 35 block: 1x1, 5x5, double 3x3 and pooled branches (Szegedy et al. 2015, figure 5)."""

    def __init__(self, in_channels, pool_channels):
        super().__init__()
        self.branch1x1 = Conv(in_channels, 64, 1)
        self.branch5x5_1 = Conv(in_channels, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding="same")
        self.branch3x3dbl_1 = Conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding="same")
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding="same")
        self.branch_pool = Conv(in_channels, pool_channels, 1)

    def forward(self, x):
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch5x5_2(self.branch5x5_1(x)),
                self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                self.branch_pool(average_pool(x)),
            ],
            dim=1,
        )  # (B, 64 + 64 + 96 + pool_channels, 35, 35)


class MixedB(nn.Module):
    """35 x 35 to 17 x 17."""

    def __init__(self, in_channels):
        super().__init__()
        self.branch3x3 = Conv(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding="same")
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x):
        return torch.cat(
            [
                self.branch3x3(x),
                self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                F.max_pool2d(x, 3, stride=2),
            ],
            dim=1,
        )  # (B, 384 + 96 + in_channels, 17, 17)


class MixedC(nn.Module):
    """17 x 17 block: 7x7 convolutions as 1x7 and 7x1 (figure 6)."""

    def __init__(self, in_channels, width):
        super().__init__()
        self.branch1x1 = Conv(in_channels, 192, 1)
        self.branch7x7_1 = Conv(in_channels, width, 1)
        self.branch7x7_2 = Conv(width, width, (1, 7), padding="same")
        self.branch7x7_3 = Conv(width, 192, (7, 1), padding="same")
        self.branch7x7dbl_1 = Conv(in_channels, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, (7, 1), padding="same")
        self.branch7x7dbl_3 = Conv(width, width, (1, 7), padding="same")
        self.branch7x7dbl_4 = Conv(width, width, (7, 1), padding="same")
        self.branch7x7dbl_5 = Conv(width, 192, (1, 7), padding="same")
        self.branch_pool = Conv(in_channels, 192, 1)

    def forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
                self.branch_pool(average_pool(x)),
            ],
            dim=1,
        )  # (B, 4 * 192, 17, 17)


class MixedD(nn.Module):
    """17 x 17 to 8 x 8."""

    def __init__(self, in_channels):
        super().__init__()
        self.branch3x3_1 = Conv(in_channels, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(in_channels, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding="same")
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding="same")
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x):
        return torch.cat(
            [
                self.branch3x3_2(self.branch3x3_1(x)),
                self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))),
                F.max_pool2d(x, 3, stride=2),
            ],
            dim=1,
        )  # (B, 320 + 192 + in_channels, 8, 8)


class MixedE(nn.Module):
    """8 x 8 block: 3x3 convolutions split into parallel 1x3 and 3x1 (figure 7)."""

    def __init__(self, in_channels, pool):
        super().__init__()
        self.branch1x1 = Conv(in_channels, 320, 1)
        self.branch3x3_1 = Conv(in_channels, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding="same")
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding="same")
        self.branch3x3dbl_1 = Conv(in_channels, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding="same")
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding="same")
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding="same")
        self.branch_pool = Conv(in_channels, 192, 1)
        self.pool = pool

    def forward(self, x):
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(single),
                self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(self.pool(x)),
            ],
            dim=1,
        )  # (B, 320 + 4 * 384 + 192, 8, 8)


class InceptionV3(nn.Module):
    """The FID network. Use ``InceptionV3.from_file(path)`` (or ``.random(seed)``), then ``.features(images)``."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding="same")
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = MixedA(192, pool_channels=32)
        self.Mixed_5c = MixedA(256, pool_channels=64)
        self.Mixed_5d = MixedA(288, pool_channels=64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(768, width=128)
        self.Mixed_6c = MixedC(768, width=160)
        self.Mixed_6d = MixedC(768, width=160)
        self.Mixed_6e = MixedC(768, width=192)
        self.Mixed_7a = MixedD(768)
        self.Mixed_7b = MixedE(1280, average_pool)
        self.Mixed_7c = MixedE(2048, max_pool)  # FID: the maximum here
        self.fc = nn.Linear(2048, 1008)  # FID: 1008 classes

    @classmethod
    def from_file(cls, path):
        """Load the FID weights, a .pth (of which nothing is run) or a .safetensors with the same names.

        Batch norms' counters ``num_batches_tracked``, which inference does not use, may be absent.

        Raises: FileNotFoundError (with the name, size and hash of the file to get), InputError for another network.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no FID weights at {path}: python -m minildm fetch inception gets them ({WEIGHTS_BYTES:,} bytes, "
                f"sha256 {WEIGHTS_SHA256}, from {WEIGHTS_URL}); or compare with --features random (FD-random, not FID)"
            )
        file = TensorFile(path)
        with torch.device("meta"):  # no time spent on initial values
            network = cls()
        wanted = {key: tensor for key, tensor in network.state_dict().items() if not key.endswith(COUNTER)}
        missing = [key for key in wanted if key not in file.shapes]
        surplus = [key for key in file.shapes if key not in wanted and not key.endswith(COUNTER)]
        present = [key for key in wanted if key in file.shapes]
        misfits = [key for key in present if file.shapes[key] != wanted[key].shape or file.dtypes[key] not in FLOATS]
        wrong = missing + surplus + misfits
        if wrong:
            raise InputError(
                f"{path} is not the FID Inception network: {len(wrong)} names, shapes or types differ, first "
                f"{wrong[0]!r}; expected {WEIGHTS_NAME}, sha256 {WEIGHTS_SHA256}{why_no_match(set(missing), surplus)}"
            )
        state = {key: tensor.to(torch.float32, copy=True) for key, tensor in file.tensors(wanted)}
        counters = {key: torch.tensor(0) for key in network.state_dict() if key.endswith(COUNTER)}
        network.load_state_dict(state | counters, assign=True)
        return network.frozen()

    @classmethod
    def random(cls, seed=0):
        """An untrained network, reproducible from its seed. What it measures is not FID.

        Kaiming-normal convolutions. Each batch norm takes the mean and variance of four fixed noise images, so that
        features are O(1) and tell images apart at every depth.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        with torch.device("meta"):
            network = cls()
        network.to_empty(device="cpu")
        for name, parameter in network.named_parameters():
            if name.endswith("conv.weight") or name == "fc.weight":
                fan_in = parameter[0].numel()
                parameter.data.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
        network.fc.bias.data.zero_()
        noise = sum(
            F.interpolate(torch.randn(4, 3, side, side, generator=generator), (SIZE, SIZE), mode="bilinear") / side**0.5
            for side in (4, 8, 16, 32, 64, 128, 256)
        )  # amplitude falls with frequency, as in natural images
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
                module.momentum = 1.0  # running statistics become those of the one batch that follows
        with torch.no_grad():
            network.train().forward(noise.clamp(-1, 1))
        return network.frozen()

    def frozen(self):
        """Prepare for inference: no gradients, batch norms folded away, channels-last memory."""
        self.eval().requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Conv):
                module.fold()
        return self.to(memory_format=torch.channels_last)

    def features(self, images, dims=DIMS):
        """FID features: spatial means after the first and second max pool, before the last stage and at the end.

        Args:
            images: (B, 3, H, W) or grey (B, 1, H, W), uint8 or float in [0, 1], any H and W.
            dims: which of 64, 192, 768, 2048; the network stops after the deepest.
        Returns: {dim: float32 (B, dim)}. Raises: InputError for another shape, type or range.
        """
        if set(dims) - set(DIMS):
            raise InputError(f"dims must be among {DIMS}, got {tuple(dims)}")
        x = prepare(images).to(self.fc.weight.device)
        # TensorFloat-32, cudnn's default, keeps 10 bits of the mantissa; parity to 1e-5 needs all 23.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return {dim: map.mean(dim=(2, 3)) for dim, map in self.forward(2 * x - 1, max(dims)).items() if dim in dims}

    def forward(self, x, deepest=2048):
        """x (B, 3, 299, 299) in [-1, 1] -> {dim: feature map (B, dim, h, w)}."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_1a_3x3(x)  # (B, 32, 149, 149)
        x = self.Conv2d_2a_3x3(x)  # (B, 32, 147, 147)
        x = self.Conv2d_2b_3x3(x)  # (B, 64, 147, 147)
        maps = {64: (x := F.max_pool2d(x, 3, stride=2))}  # (B, 64, 73, 73)
        if deepest == 64:
            return maps
        x = self.Conv2d_3b_1x1(x)  # (B, 80, 73, 73)
        x = self.Conv2d_4a_3x3(x)  # (B, 192, 71, 71)
        maps[192] = x = F.max_pool2d(x, 3, stride=2)  # (B, 192, 35, 35)
        if deepest == 192:
            return maps
        x = self.Mixed_5b(x)  # (B, 256, 35, 35)
        x = self.Mixed_5c(x)  # (B, 288, 35, 35)
        x = self.Mixed_5d(x)  # (B, 288, 35, 35)
        x = self.Mixed_6a(x)  # (B, 768, 17, 17)
        x = self.Mixed_6b(x)  # (B, 768, 17, 17)
        x = self.Mixed_6c(x)  # (B, 768, 17, 17)
        x = self.Mixed_6d(x)  # (B, 768, 17, 17)
        maps[768] = x = self.Mixed_6e(x)  # (B, 768, 17, 17)
        if deepest == 768:
            return maps
        x = self.Mixed_7a(x)  # (B, 1280, 8, 8)
        x = self.Mixed_7b(x)  # (B, 2048, 8, 8)
        maps[2048] = self.Mixed_7c(x)  # (B, 2048, 8, 8)
        return maps

    def logits(self, features):
        """(B, 2048) final features -> (B, 1008) class logits, as the Inception Score uses."""
        return self.fc(features)


def prepare(images):
    """Images (B, 3 or 1, H, W), uint8 or float in [0, 1] -> the network's input (B, 3, 299, 299) float32 in [0, 1].

    Grey is repeated to three channels. The resize is bilinear without antialiasing and without aligned corners, as in
    TensorFlow's original pipeline and in pytorch-fid. Raises: InputError for another shape, type or range.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise InputError(f"images must be (B, 3, H, W) or (B, 1, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        images = images.float() / 255
    elif not images.is_floating_point():
        raise InputError(f"images must be uint8 or float in [0, 1], got {images.dtype}")
    elif images.numel() and not (images.min() > -1e-4 and images.max() < 1 + 1e-4):  # allows rounding; NaN fails
        raise InputError(
            f"float images must lie in [0, 1], got [{images.min():.3g}, {images.max():.3g}]; map [-1, 1] by x / 2 + 0.5"
        )
    images = images.float().expand(-1, 3, -1, -1)
    return F.interpolate(images, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=False)
