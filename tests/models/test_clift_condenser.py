"""Condenser against its dense masked form, and what its cost follows."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models.clift.clift import Clift
from models.clift.clustering import Clusters
from models.clift.condenser import Condenser, bucket_members, read_members
from tests.models.clift_networks import SMALL, random_clusters, shake, small_clift

WIDTH, HEADS = 32, 4


class DenseCondenser(nn.Module):
    """Torch's own decoder layers with a mask over all pairs of anchor and token."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(
            WIDTH, HEADS, 48, 0.0, "relu", batch_first=True, norm_first=True
        )
        self.cross_attn = layer if layers == 1 else nn.TransformerDecoder(layer, layers)
        self.linear1 = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor, clusters: Clusters) -> Tensor:
        scenes = torch.arange(len(tokens))[:, None]
        anchors = tokens[scenes, clusters.anchors]
        own = clusters.labels[scenes, clusters.anchors]  # (B, K)
        hidden = own[:, :, None] != clusters.labels[:, None]  # (B, K, N)
        hidden[~clusters.valid] = False
        h = self.cross_attn(
            anchors,
            tokens,
            tgt_key_padding_mask=~clusters.valid,
            memory_mask=hidden.repeat_interleave(HEADS, 0),
        )
        return anchors + self.linear1(h)


def pair(layers: int = 1) -> tuple[Condenser, DenseCondenser]:
    """Ours and the dense form with the same weights."""
    torch.manual_seed(0)
    dense = DenseCondenser(layers)
    shake(dense)
    ours = Condenser(WIDTH, HEADS, 48, layers=layers)
    ours.load_state_dict(dense.state_dict())
    return ours, dense


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("counts", [[1, 1], [7, 30], [40, 3]])
def test_equals_the_dense_masked_form(layers: int, counts: list[int]) -> None:
    ours, dense = pair(layers)
    tokens = torch.randn(2, 40, WIDTH)
    clusters = random_clusters(tokens, counts)
    valid = clusters.valid
    out = ours(tokens, clusters)
    assert_close(out[valid], dense(tokens, clusters)[valid], atol=2e-5, rtol=0)
    assert not out[~valid].any()


def test_padded_tokens_are_never_read_whatever_they_hold() -> None:
    ours, dense = pair()
    tokens = torch.randn(2, 40, WIDTH)
    clusters = random_clusters(tokens, [7, 12], padded=9)
    valid = clusters.valid
    out = ours(tokens, clusters)
    assert_close(out[valid], dense(tokens, clusters)[valid], atol=2e-5, rtol=0)
    tokens[:, -9:] = torch.nan
    assert torch.equal(ours(tokens, clusters), out)


def test_gradients_equal_those_of_the_dense_masked_form() -> None:
    ours, dense = pair()
    clusters = random_clusters(torch.randn(2, 40, WIDTH), [7, 30])
    gradients = []
    for module in (ours, dense):
        tokens = torch.randn(2, 40, WIDTH, generator=torch.Generator().manual_seed(1))
        tokens.requires_grad_()
        module(tokens, clusters)[clusters.valid].square().sum().backward()
        found = {name: p.grad for name, p in module.named_parameters()} | {"tokens": tokens.grad}
        gradients.append({name: g for name, g in found.items() if g is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = float(gradients[1][name].abs().max())
        assert_close(gradient, gradients[1][name], atol=2e-5 * scale, rtol=0, msg=name)


def test_starts_as_the_anchors_themselves() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(1, 20, WIDTH)
    clusters = random_clusters(tokens, [6])
    out = Condenser(WIDTH, HEADS, 48)(tokens, clusters)
    assert torch.equal(out, tokens[:, clusters.anchors[0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_half_precision_is_finite_forward_and_backward(dtype: torch.dtype, scale: float) -> None:
    ours, _ = pair()
    # Large tokens: the encoder's residual stream is not normalised.
    tokens = (scale * torch.randn(2, 40, WIDTH)).requires_grad_()
    clusters = random_clusters(tokens.detach(), [40, 11])
    exact = ours(tokens, clusters)
    with torch.autocast("cpu", dtype=dtype):
        out = ours(tokens, clusters)
    assert_close(out.float(), exact, atol=0.05 * scale, rtol=0.05)
    out.float().mean().backward()
    gradients = [p.grad for p in ours.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_dropout_hits_attention_weights_as_in_the_dense_form() -> None:
    torch.manual_seed(0)
    ours = Condenser(WIDTH, HEADS, 48, dropout=0.3)
    shake(ours)
    ours.cross_attn.dropout = 0.0  # leaves attention weights alone
    tokens = torch.randn(1, 12, WIDTH)
    clusters = random_clusters(tokens, [1])
    layer = ours.cross_attn.multihead_attn
    queries = torch.randn(1, 1, WIDTH)
    buckets = bucket_members(clusters)
    layer.train()
    mean = torch.stack([read_members(layer, queries, tokens, buckets) for _ in range(3000)]).mean(0)
    assert_close(mean, read_members(layer.eval(), queries, tokens, buckets), atol=0.05, rtol=0)
    assert_close(
        layer.read(queries, layer.remember(tokens)),
        read_members(layer, queries, tokens, buckets),
        atol=2e-5,
        rtol=0,
    )


def test_buckets_hold_every_member_once_with_at_most_half_padding() -> None:
    tokens = torch.randn(3, 200, WIDTH)
    clusters = random_clusters(tokens, [1, 70, 200], padded=0)
    buckets = bucket_members(clusters)
    members = torch.cat([bucket.members[bucket.valid] for bucket in buckets])
    assert members.sort().values.tolist() == list(range(600))
    for bucket in buckets:
        sizes = bucket.valid.sum(1)
        assert (2 * sizes > bucket.members.shape[1]).all()
        owner = clusters.labels + 200 * torch.arange(3)[:, None]
        mine = owner.flatten()[bucket.members]
        assert (mine == bucket.clusters[:, None])[bucket.valid].all()


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any result, views left out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


def cost(total: int, count: int) -> tuple[int, int]:
    """Operations, and elements of the largest tensor, to condense to ``count`` tokens."""
    ours, _ = pair()
    tokens = torch.randn(1, total, WIDTH)
    clusters = random_clusters(tokens, [count])
    with torch.no_grad(), LargestTensor() as largest:
        ours(tokens, clusters)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        ours(tokens, clusters)
    return flops.get_total_flops(), largest.elements


def test_operations_and_memory_follow_the_tokens_kept() -> None:
    operations = {count: cost(1024, count)[0] for count in (512, 128, 32)}
    assert operations[128] < 0.35 * operations[512]
    assert operations[32] < 0.2 * operations[512]
    small, large = (cost(total, total // 16)[1] for total in (1024, 4096))
    assert large <= 6 * small  # linear in the tokens would be 4, quadratic 16
    assert large < 4096 * 4096 // 4


def test_network_without_condenser_says_so() -> None:
    tokens = torch.randn(1, 10, WIDTH)
    with pytest.raises(ValueError, match=r"condense=False.*stage 1"):
        small_clift(condense=False).condense(tokens, random_clusters(tokens, [3]))


def test_several_layers_are_stored_as_a_numbered_stack_with_one_final_map() -> None:
    model = Clift(replace(SMALL, condenser_layers=2))
    keys = [key for key in model.state_dict() if key.startswith("squeezer.")]
    assert sum(key.startswith("squeezer.cross_attn.layers.1.multihead_attn.") for key in keys) == 4
    assert [key for key in keys if key.startswith("squeezer.linear1")] == [
        "squeezer.linear1.weight",
        "squeezer.linear1.bias",
    ]
