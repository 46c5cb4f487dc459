"""The text encoder: token ids (B, 77) -> context (B, 77, D), one feature vector per token.

The text half of CLIP (Radford et al. 2021, arXiv:2103.00020, section 2.4), a transformer with causal attention.
SD 1.x has that of ViT-L/14: 12 layers, width 768, quick_gelu. SD 2.x has that of OpenCLIP's ViT-H/14: 24 layers, width
1024, gelu, of which it uses the output of the 23rd, so only 23 are built. Both end with the final layer norm.
"""

import torch
import torch.nn.functional as F
from torch import nn

from minildm.config import MAX_TOKENS
from minildm.layers import attend


def quick_gelu(x):
    """An approximation of GELU: x sigmoid(1.702 x) (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2)."""
    return x * torch.sigmoid(1.702 * x)


class CausalAttention(nn.Module):
    """Self-attention of each token to itself and the tokens before it: (B, 77, D) -> (B, 77, D)."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x):
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.n_heads, causal=True))


class MLP(nn.Module):
    def __init__(self, dim, mlp_dim, activation):
        super().__init__()
        self.activation = quick_gelu if activation == "quick_gelu" else F.gelu
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, dim)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.self_attn = CausalAttention(config.width, config.n_heads)
        self.layer_norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_width, config.activation)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embedding(nn.Embedding):
    def reset_parameters(self):
        if not self.weight.is_meta:  # normal_ on the meta device makes torch import more of itself: 2 s for nothing
            nn.init.normal_(self.weight, std=0.02)


class Embeddings(nn.Module):
    """Token embedding plus position embedding: (B, 77) -> (B, 77, D)."""

    def __init__(self, config):
        super().__init__()
        self.token_embedding = Embedding(config.vocabulary, config.width)
        self.position_embedding = Embedding(MAX_TOKENS, config.width)

    def forward(self, token_ids):
        return self.token_embedding(token_ids) + self.position_embedding.weight


class TextEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.text_model = nn.Module()  # a prefix in the checkpoints' names
        self.text_model.embeddings = Embeddings(config)
        self.text_model.encoder = nn.Module()
        self.text_model.encoder.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layers))
        self.text_model.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, token_ids):
        """token_ids (B, 77) int64 -> context (B, 77, D)."""
        x = self.text_model.embeddings(token_ids)
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        return self.text_model.final_layer_norm(x)
