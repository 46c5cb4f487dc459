"""Ranks as a table of text: where in the networks an adapter has grown."""

import re

# What a layer does in its block, by a mark in its path.
LAYER_KINDS = (
    ("attn1.to_", "self "),
    ("attn2.to_", "cross "),
    ("ff.net.0", "widen"),
    ("ff.net.2", "narrow"),
    ("time_emb_proj", "time"),
    ("linear_", "linear "),
    ("proj_", "proj "),
    ("self_attn.", "self "),
    ("mlp.", ""),
)
BLOCK_NAME = re.compile(r"(down_blocks\.\d|up_blocks\.\d|mid_block|time_embedding|layers\.\d+)")


def layer_kind(path):
    """ "unet...attn2.to_q" -> "cross q"."""
    mark, word = next((mark, word) for mark, word in LAYER_KINDS if mark in path)
    tail = path.partition(mark)[2] if mark.endswith(("_", ".")) else ""
    return word + tail.removesuffix(".0").removesuffix("_proj")


def is_layer(path):
    """Whether a module path is one that the tables have a place for."""
    return bool(BLOCK_NAME.search(path)) and any(mark in path for mark, _ in LAYER_KINDS)


def rank_table(ranks):
    """{module path: rank} -> {network: {block: {kind of layer: mean rank}}}, in the order of the paths."""
    tables = {}
    for path, rank in ranks.items():
        row = tables.setdefault(path.split(".")[0], {}).setdefault(BLOCK_NAME.search(path)[1], {})
        row.setdefault(layer_kind(path), []).append(rank)
    return {
        network: {block: {kind: sum(cell) / len(cell) for kind, cell in row.items()} for block, row in rows.items()}
        for network, rows in tables.items()
    }


def kinds_of(rows):
    """The kinds of layer in {block: {kind: ...}}, the columns of a table."""
    return list(dict.fromkeys(kind for block in sorted(rows) for kind in rows[block]))


def rank_map(ranks):
    """{module path: rank} -> text: one line per block, one column per kind of layer, the mean rank in each cell."""
    lines = []
    for network, rows in rank_table(ranks).items():
        kinds = kinds_of(rows)
        lines.append(f"{network:<16}" + "".join(f"{kind:>10}" for kind in kinds))
        for block, row in rows.items():
            cells = (f"{row[kind]:.1f}" if kind in row else "." for kind in kinds)
            lines.append(f"  {block:<14}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)
