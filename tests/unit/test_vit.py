from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fourdh_batch.models.vit import Attention, PatchEmbed, ViT


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_tokens_run_row_by_row_and_patches_are_shifted_by_two_pixels() -> None:
    patches = PatchEmbed(1)
    torch.nn.init.ones_(patches.proj.weight)
    torch.nn.init.zeros_(patches.proj.bias)
    image = torch.zeros(1, 3, 256, 192)
    image[0, 0, 14, 30] = 1  # first pixel of row 1 and of column 2
    image[0, 1, 254:, :] = 9  # never seen
    image[0, 1, :, 190:] = 9
    with torch.no_grad():
        tokens = patches(image)[0, :, 0]
    assert tokens.shape == (192,)
    assert tokens.nonzero().flatten().tolist() == [1 * 12 + 2]


def test_attention_equals_the_explicit_formula(generator: torch.Generator) -> None:
    attention = Attention(24, 3)
    tokens = torch.randn(2, 5, 24, generator=generator)
    with torch.no_grad():
        q, k, v = attention.qkv(tokens).view(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, dim=-1)
        expected = attention.proj((weights @ v).transpose(1, 2).reshape(2, 5, 24))
        torch.testing.assert_close(attention(tokens), expected, rtol=0, atol=1e-6)


def test_attention_in_bf16_differs_by_rounding_alone(generator: torch.Generator) -> None:
    attention = Attention(16, 2)
    x = torch.randn(1, 7, 16, generator=generator)
    exact = attention(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attention(x)
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded.float() - exact).abs().max() < 0.02 * exact.abs().max()


def test_slot_zero_of_the_positions_is_added_to_every_token(generator: torch.Generator) -> None:
    vit = ViT(depth=1, dim=16, num_heads=2)
    image = torch.randn(1, 3, 256, 192, generator=generator)
    with torch.no_grad():
        plain = vit(image)
        vit.pos_embed[:, 0] = torch.linspace(-1, 1, 16)
        shifted = vit(image)
        vit.pos_embed[:, 0] = 0
        vit.pos_embed[:, 1:] = torch.linspace(-1, 1, 16)
        spread = vit(image)
    assert (plain - shifted).abs().max() > 0.1
    torch.testing.assert_close(shifted, spread, rtol=0, atol=1e-6)


def test_gelu_is_the_exact_one(generator: torch.Generator) -> None:
    vit = ViT(depth=1, dim=16, num_heads=2)
    hidden = torch.randn(4, 64, generator=generator) * 3
    mlp = vit.blocks[0].mlp
    with torch.no_grad():
        torch.nn.init.eye_(mlp.fc1.weight)
        torch.nn.init.zeros_(mlp.fc1.bias)
        torch.nn.init.eye_(mlp.fc2.weight)
        torch.nn.init.zeros_(mlp.fc2.bias)
        got = mlp(hidden[:, :16])
    expected = F.gelu(hidden[:, :16], approximate="none")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    assert (got - F.gelu(hidden[:, :16], approximate="tanh")).abs().max() > 1e-5


def test_branches_are_dropped_in_training_only(generator: torch.Generator) -> None:
    vit = ViT(depth=3, dim=16, num_heads=2)
    vit.set_drop_path(0.5)
    assert [block.drop_path for block in vit.blocks] == [0, 0.25, 0.5]
    block = vit.blocks[2]
    tokens = torch.randn(400, 5, 16, generator=generator)
    with torch.no_grad():
        block.mlp.fc2.weight.zero_()  # one branch is left, which is dropped or doubled
        block.mlp.fc2.bias.zero_()
        whole = block.eval()(tokens) - tokens
        torch.manual_seed(0)
        dropped = block.train()(tokens) - tokens
    is_kept = dropped.abs().amax(dim=(1, 2)) > 0
    assert 0.4 < is_kept.float().mean() < 0.6  # of 400 with probability one half
    torch.testing.assert_close(dropped[is_kept], 2 * whole[is_kept], rtol=0, atol=1e-5)
