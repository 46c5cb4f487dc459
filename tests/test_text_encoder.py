"""The text encoder against transformers' CLIPTextModel. (Against open_clip's text tower: test_checkpoint.py.)"""

import copy

import peers
import pytest
import torch
import torch.nn.functional as F
from peers import PARITY, relative_error
from torch import nn

from minildm.checkpoint.folder import text_encoder_from_json
from minildm.config import TextEncoderConfig
from minildm.text_encoder import TextEncoder

LAYOUTS = {
    "v1-shaped": TextEncoderConfig.tiny(),
    "v2-shaped": TextEncoderConfig.tiny(activation="gelu"),
    "one head": TextEncoderConfig.tiny(width=48, n_heads=1, n_layers=1, vocabulary=49408),
    "deep": TextEncoderConfig.tiny(n_layers=12, mlp_width=96),
}


def token_ids(batch=2, seed=0):
    ids = torch.randint(0, 49406, (batch, 77), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, 40:] = 49406, 49407
    return ids


@torch.no_grad()
def error(ours, theirs, ids):
    return relative_error(ours(ids), theirs(ids).last_hidden_state)


@pytest.mark.parametrize("quiet", [False, True], ids=["ordinary", "small activations"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_text_encoder_matches_transformers(name, quiet):
    text_encoder = peers.random_network(LAYOUTS[name], seed=1, quiet=quiet)
    peer = peers.transformers_text_encoder(text_encoder)
    for ids in (token_ids(3), torch.full((1, 77), 49407), torch.zeros(1, 77, dtype=torch.int64)):
        assert error(text_encoder, peer, ids) <= PARITY


def attend_both_ways(monkeypatch, _):
    right = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, is_causal, **options: right(*args, **options))


def other_activation(monkeypatch, text_encoder):
    for layer in text_encoder.text_model.encoder.layers:
        layer.mlp.activation = F.gelu


def no_final_norm(monkeypatch, text_encoder):
    text_encoder.text_model.final_layer_norm = nn.Identity()


MISTAKES = {
    "eps 1e-6": lambda _, text_encoder: peers.set_eps(text_encoder, 1e-6, nn.LayerNorm),
    "no causal mask": attend_both_ways,
    "gelu for quick_gelu": other_activation,
    "no final norm": no_final_norm,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_tolerance_catches(mistake, monkeypatch):
    text_encoder = peers.random_network(LAYOUTS["v1-shaped"], seed=2, quiet=True)
    for layer in text_encoder.text_model.encoder.layers:  # small inputs for the norms, but no negligible branch
        layer.self_attn.out_proj.weight.data *= 5
        layer.mlp.fc2.weight.data *= 5
    peer = peers.transformers_text_encoder(text_encoder)
    with torch.no_grad():
        right = peer(token_ids()).last_hidden_state
        assert relative_error(text_encoder(token_ids()), right) <= PARITY
        wrong = copy.deepcopy(text_encoder)
        MISTAKES[mistake](monkeypatch, wrong)
        assert relative_error(wrong(token_ids()), right) > 2 * PARITY


def test_a_token_attends_only_to_tokens_before_it():
    text_encoder = peers.random_network(LAYOUTS["v1-shaped"], seed=3)
    ids = token_ids(1)
    other = ids.clone()
    other[0, 30:] = 123
    with torch.no_grad():
        before, after = text_encoder(ids), text_encoder(other)
    torch.testing.assert_close(before[:, :30], after[:, :30], rtol=0, atol=1e-5)
    assert (before[:, 30:] - after[:, 30:]).abs().amax(dim=-1).min() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_rounds_no_worse_than_transformers(dtype):
    text_encoder = peers.random_network(LAYOUTS["deep"], seed=4)
    with torch.no_grad():
        exact = text_encoder(token_ids())
        text_encoder = text_encoder.to(dtype)
        ours = relative_error(text_encoder(token_ids()), exact)
        theirs = relative_error(peers.transformers_text_encoder(text_encoder)(token_ids()).last_hidden_state, exact)
    assert 0 < ours <= 1.5 * theirs
    assert ours <= 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "document, size", [(peers.SD15_TEXT, 123_060_480), (peers.SD21_TEXT, 340_387_840)], ids=["v1.5", "v2.1"]
)
def test_full_size_parameters_are_those_of_transformers(document, size):
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        ours = TextEncoder(text_encoder_from_json(document))
        theirs = CLIPTextModel(CLIPTextConfig(**{k: v for k, v in document.items() if k != "architectures"}))
    assert {name.removeprefix("text_model."): tensor.shape for name, tensor in ours.state_dict().items()} == {
        name.removeprefix("text_model."): tensor.shape for name, tensor in theirs.state_dict().items()
    }
    assert sum(parameter.numel() for parameter in ours.parameters()) == size
