from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fourdh_batch.models.build import HMR2_SIZES, build_hmr2, untrained_hmr2
from fourdh_batch.models.hmr2 import Hmr2, HmrOutput
from fourdh_batch.models.smpl import SmplBody, load_body
from fourdh_batch.models.smpl_head import CrossAttention, SelfAttention, SmplHead
from fourdh_batch.models.vit import ViT


@pytest.fixture(scope="module")
def body() -> SmplBody:
    return load_body()


@pytest.fixture(scope="module")
def crops() -> Tensor:
    return torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))


def tiny(body: SmplBody, precision: str = "fp32", **changed: Tensor) -> Hmr2:
    """A seeded model; `changed` replaces weights, dots written as double underscores."""
    model = untrained_hmr2("tiny", body, device="cpu", precision=precision)
    with torch.no_grad():
        for name, value in changed.items():
            model.get_parameter(name.replace("__", ".")).copy_(value)
    return model


def run(model: Hmr2, crops: Tensor, *, with_vertices: bool = False) -> HmrOutput:
    with torch.inference_mode():
        return model(crops, with_vertices=with_vertices)


def explicit_cross_attention(layer: CrossAttention, query: Tensor, context: Tensor) -> Tensor:
    """Keys and values of every token, as the published code forms them."""
    batch, heads = len(query), layer.num_heads
    k, v = layer.to_kv(context).chunk(2, dim=-1)
    q = layer.to_q(query)[:, None]
    q, k, v = (x.view(batch, x.shape[1], heads, -1).transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-1, -2) * layer.scale, dim=-1)
    return layer.to_out((weights @ v).transpose(1, 2).reshape(batch, -1))


def test_cross_attention_without_keys_and_values_equals_the_explicit_one() -> None:
    torch.manual_seed(0)
    layer = CrossAttention(dim=48, context_dim=40, num_heads=4, head_dim=8)
    query, context = torch.randn(3, 48), torch.randn(3, 192, 40)
    with torch.no_grad():
        expected = explicit_cross_attention(layer, query, context)
        torch.testing.assert_close(layer(query, context), expected, rtol=0, atol=1e-6)


def test_self_attention_of_one_token_is_its_value() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(dim=48, num_heads=4, head_dim=8)
    query = torch.randn(3, 48)
    with torch.no_grad():
        q, k, v = layer.to_qkv(query)[:, None].view(3, 1, 3, 4, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(3, 32)
        torch.testing.assert_close(layer(query), layer.to_out(mixed), rtol=0, atol=1e-6)


def test_work_of_the_full_model() -> None:
    size = HMR2_SIZES["vit_h"]
    with torch.device("meta"):
        backbone = ViT(depth=size.vit_depth, dim=size.vit_dim, num_heads=size.vit_heads)
        head = SmplHead(
            dim=size.head_dim,
            depth=size.head_depth,
            num_heads=size.head_heads,
            head_dim=size.head_head_dim,
            mlp_dim=size.head_mlp_dim,
            context_dim=size.vit_dim,
        )
        image = torch.empty(1, 3, 256, 192)
    with FlopCounterMode(display=False) as counter:
        tokens = backbone(image)
    assert counter.get_total_flops() == pytest.approx(248.01e9, rel=1e-4)
    with FlopCounterMode(display=False) as counter:
        head(tokens)
    # The published head spends 3.09e9, nearly all of it on keys and values.
    assert counter.get_total_flops() == pytest.approx(0.1136e9, rel=1e-3)


def test_output_has_shapes_and_vertices_on_request(body: SmplBody, crops: Tensor) -> None:
    model = tiny(body)
    got = run(model, crops)
    assert got.global_orient.shape == (2, 1, 3, 3)
    assert got.body_pose.shape == (2, 23, 3, 3)
    assert got.betas.shape == (2, 10)
    assert got.pred_cam.shape == got.pred_cam_t.shape == (2, 3)
    assert got.keypoints_3d.shape == (2, 44, 3)
    assert got.keypoints_2d.shape == (2, 44, 2)
    assert got.vertices is None
    full = run(model, crops, with_vertices=True)
    assert full.vertices is not None
    assert full.vertices.shape == (2, 6890, 3)
    torch.testing.assert_close(full.keypoints_3d, got.keypoints_3d, rtol=0, atol=1e-6)


def test_crops_of_another_size_are_refused(body: SmplBody) -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 3, 256, 256\), got \(1, 3, 256, 192\)"):
        tiny(body)(torch.zeros(1, 3, 256, 192))


def test_only_the_middle_columns_of_a_crop_count(body: SmplBody, crops: Tensor) -> None:
    changed = crops.clone()
    changed[..., :32] = changed[..., 224:] = 5
    model = tiny(body)
    assert torch.equal(run(model, crops).token_out, run(model, changed).token_out)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("fp16", 0.01)])
def test_reduced_precision_touches_the_backbone_only(
    body: SmplBody, crops: Tensor, precision: str, tolerance: float
) -> None:
    exact, reduced = tiny(body), tiny(body, precision)
    tokens = [model.tokens(crops) for model in (exact, reduced)]
    assert tokens[1].dtype == torch.float32
    difference = (tokens[0] - tokens[1]).abs().max()
    assert 0 < difference < tolerance
    got = run(reduced, crops)
    assert all(
        getattr(got, name).dtype == torch.float32
        for name in ("global_orient", "body_pose", "betas", "pred_cam", "keypoints_3d")
    )
    with torch.inference_mode():
        assert torch.equal(exact.smpl_head(reduced.tokens(crops)).betas, got.betas)


def test_auto_precision_is_exact_on_a_cpu(body: SmplBody, crops: Tensor) -> None:
    auto = tiny(body, "auto")
    assert auto.active_precision == "fp32"
    assert torch.equal(auto.tokens(crops), tiny(body, "fp32").tokens(crops))


def test_an_unknown_precision_is_refused(body: SmplBody) -> None:
    with pytest.raises(ValueError, match=r"expected one of .*, got 'fp8'"):
        tiny(body, "fp8")


def test_only_crops_that_overflow_in_fp16_run_again(
    body: SmplBody, crops: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    # A patch embedding of large gain: one loud crop leaves the range of fp16, a black one not.
    gain = torch.full((64, 3, 16, 16), 200.0)
    exact = tiny(body, backbone__patch_embed__proj__weight=gain)
    model = tiny(body, "fp16", backbone__patch_embed__proj__weight=gain)
    both = torch.stack([torch.zeros(3, 256, 256), torch.full((3, 256, 256), 2.0)])
    with caplog.at_level(logging.WARNING), torch.inference_mode():
        tokens = model.tokens(both)
        model.tokens(both)
    assert model.num_overflows == 2
    assert [r.message for r in caplog.records if "overflowed" in r.message] == [
        "fp16 overflowed in the backbone; such crops run in fp32"
    ]
    with torch.inference_mode():
        expected = exact.tokens(both[1:])
        quiet = model.tokens(both[:1])
    assert torch.equal(tokens[1:], expected)
    assert torch.equal(tokens[:1], quiet)
    assert model.num_overflows == 2


def test_reduced_weights_follow_the_weights(body: SmplBody, crops: Tensor) -> None:
    model, other = tiny(body, "fp16"), untrained_hmr2("tiny", body, seed=1, precision="fp16")
    before = model.tokens(crops)
    model.load_state_dict(other.state_dict())
    after = model.tokens(crops)
    assert torch.equal(after, other.tokens(crops))
    assert not torch.equal(before, after)
    model.backbone.blocks[0].mlp.fc2.bias.data += 1
    model.to("cpu")
    assert not torch.equal(model.tokens(crops), after)


def test_reduced_weights_are_no_part_of_the_state(body: SmplBody, crops: Tensor) -> None:
    model = tiny(body, "fp16")
    names = set(model.state_dict())
    model.tokens(crops)
    assert set(model.state_dict()) == names


def test_tf32_switches_are_put_back(body: SmplBody, crops: Tensor) -> None:
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    seen = []
    for precision in ("fp32", "tf32"):
        model = tiny(body, precision)
        for part in (model.backbone, model.smpl_head):
            part.register_forward_hook(
                lambda *_: seen.append([switch.allow_tf32 for switch in switches])
            )
        run(model, crops)
    assert seen == [[False, False], [False, False], [True, True], [False, False]]
    assert [switch.allow_tf32 for switch in switches] == before


def test_gradients_reach_all_weights_that_act(body: SmplBody, crops: Tensor) -> None:
    model = tiny(body)
    output = model(crops)
    (output.keypoints_2d.square().sum() + output.betas.sum()).backward()
    without = {
        name
        for name, weight in model.named_parameters()
        if weight.grad is None or not weight.grad.any()
    }
    # Its input is always zero.
    assert without == {"smpl_head.transformer.to_token_embedding.weight"}
    qkv = model.get_parameter("smpl_head.transformer.transformer.layers.0.0.fn.to_qkv.weight").grad
    assert qkv is not None
    assert not qkv[: len(qkv) * 2 // 3].any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # PyTorch's own
def test_compiled_blocks_give_the_same(body: SmplBody, crops: Tensor) -> None:
    model = tiny(body)
    compiled = build_hmr2(
        "tiny",
        body,
        model.state_dict(),
        origin="untrained",
        device="cpu",
        precision="fp32",
        compile_blocks=True,
    )
    np.testing.assert_allclose(
        run(compiled, crops).token_out, run(model, crops).token_out, rtol=0, atol=3e-5
    )
    assert set(compiled.state_dict()) == set(model.state_dict())
