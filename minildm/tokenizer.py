"""Prompts -> token ids: CLIP's byte-pair encoding (Radford et al. 2021, arXiv:2103.00020), by open_clip.

open_clip cleans prompts first: ftfy repairs broken Unicode, HTML entities are resolved, white space is collapsed and
letters become lower case. Hugging Face's tokenizer cleans less, so it differs on curly quotes, ligatures, entities,
control characters, a Greek sigma that ends a word in capitals, and a literal ``<|startoftext|>`` or ``<|endoftext|>``.
Added here: the padding token, which differs between SD 1.x and 2.x, and a warning that names what is cut.
"""

import functools
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import torch

from minildm.config import MAX_TOKENS

BEGIN, END = 49406, 49407  # <|startoftext|>, <|endoftext|>


@functools.cache
def _byte_pair_encoder():
    """open_clip's tokenizer, loaded from its file: ``import open_clip`` also imports torchvision and timm, 3 s more."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        raise ModuleNotFoundError("the tokenizer comes from open_clip: pip install open-clip-torch")
    path = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("minildm_open_clip_tokenizer", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._tokenizer  # the one built on import; another would take 0.2 s


@functools.cache
def merges():
    """CLIP's merges in their order, each "a b"."""
    ranks = _byte_pair_encoder().bpe_ranks
    return [" ".join(pair) for pair in sorted(ranks, key=ranks.get)]


@functools.cache
def vocabulary():
    """{token: id} of CLIP's 49,408 tokens, in order."""
    ids = _byte_pair_encoder().encoder
    ours = sorted(ids, key=ids.get)[:BEGIN]  # open_clip has other names for the last two
    tokens = [*ours, "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


def vocabulary_files(pad_token_id=END):
    """{file name: text} of the files from which transformers builds this tokenizer."""
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "!" if pad_token_id == 0 else "<|endoftext|>",
    }
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS, "do_lower_case": True}
    return {
        "vocab.json": json.dumps(vocabulary()),
        "merges.txt": "\n".join(["#version: 0.2", *merges()]) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(about | special, indent=2) + "\n",
    }


class Tokenizer:
    """Prompts -> token ids (B, 77) int64: begin, at most 75 tokens, end, then ``pad_token_id``."""

    def __init__(self, pad_token_id=END):
        self.pad_token_id = pad_token_id

    def encode(self, prompt):
        """The prompt's token ids, a list of any length, without the begin and end tokens."""
        return _byte_pair_encoder().encode(prompt)

    def decode(self, token_ids):
        """The text of a list of token ids, cleaned as `encode` cleans it."""
        return _byte_pair_encoder().decode(token_ids).strip()

    def cut(self, prompt):
        """The end of the prompt that the model will not see; '' if the whole prompt fits."""
        return self.decode(self.encode(prompt)[MAX_TOKENS - 2 :])

    def __call__(self, prompts):
        """A list of B prompts -> token ids (B, 77) int64. Warns if a prompt has over 75 tokens, naming what is cut."""
        token_ids = torch.full((len(prompts), MAX_TOKENS), self.pad_token_id, dtype=torch.int64)
        for row, prompt in zip(token_ids, prompts):
            tokens = self.encode(prompt)
            if len(tokens) > MAX_TOKENS - 2:
                cut = self.cut(prompt)
                warnings.warn(
                    f"the prompt has {len(tokens)} tokens and only the first {MAX_TOKENS - 2} are read; "
                    f"cut: {cut[:200]!r}" + " ..." * (len(cut) > 200),
                    stacklevel=2,
                )
            tokens = [BEGIN, *tokens[: MAX_TOKENS - 2], END]
            row[: len(tokens)] = torch.tensor(tokens)
        return token_ids
