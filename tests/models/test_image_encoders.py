"""Frozen encoders: the right layer and tokens of three libraries, frozen and identifiable."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import transformers
from open_clip.transformer import VisionTransformer as OpenClipVisionTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.image_encoders.class_attention import class_attention_weights
from models.image_encoders.encoders import (
    FrozenEncoder,
    OpenClipTower,
    TimmTower,
    TransformersTower,
)
from tests.models.vision_towers import (
    IMAGE,
    MEAN,
    NAMES,
    PREFIX,
    SIZES,
    STD,
    build_encoder,
    build_network,
    build_tower,
    normalised,
    random_images,
)


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "registers"])
@pytest.mark.parametrize("layer", [1, 3, -1, -2, -4])
def test_transformers_layers_are_its_hidden_states(name: str, layer: int) -> None:
    encoder = build_encoder(name, layer)
    encoded = encoder(random_images())
    with torch.no_grad():
        states = encoder.network(
            normalised(random_images()), output_hidden_states=True
        ).hidden_states
    assert len(states) == 5
    assert torch.allclose(encoded.tokens, states[layer][:, PREFIX[name] :], atol=1e-6)
    assert torch.allclose(encoded.prefix, states[layer][:, : PREFIX[name]], atol=1e-6)


# CLIP's own last hidden state leaves the norm to the class token.
@pytest.mark.parametrize("name", ["siglip", "dinov2", "registers"])
def test_final_norm_gives_what_the_library_calls_its_last_hidden_state(name: str) -> None:
    plain = build_encoder(name, -1)
    encoder = FrozenEncoder(plain._held[0], -1, MEAN, STD, final_norm=True)
    with torch.no_grad():
        output: Any = encoder.network(normalised(random_images()))
        expected = output.last_hidden_state
    assert torch.allclose(encoder(random_images()).tokens, expected[:, PREFIX[name] :], atol=1e-6)
    assert encoder.identity != plain.identity


def test_final_norm_of_an_inner_layer_is_refused() -> None:
    tower = build_encoder("registers", -1)._held[0]
    with pytest.raises(ValueError, match="final_norm=True with layer=-2"):
        FrozenEncoder(tower, -2, MEAN, STD, final_norm=True)


def test_layer_minus_two_of_clip_is_what_llava_next_projects() -> None:
    from transformers import LlamaConfig, LlavaNextConfig, LlavaNextModel

    text = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    vision = transformers.CLIPVisionConfig(intermediate_size=40, **SIZES, **IMAGE)
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_grid_pinpoints=[[32, 32]],
        image_token_index=39,
    )
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    llava = LlavaNextModel(config).eval()
    projected: list[Tensor] = []
    llava.multi_modal_projector.register_forward_pre_hook(lambda _, args: projected.append(args[0]))
    tiles = normalised(random_images(batch=2))
    with torch.no_grad():
        llava.get_image_features(tiles[None], torch.tensor([[32, 32]]))
    encoder = FrozenEncoder(TransformersTower(llava.vision_tower), layer=-2, mean=MEAN, std=STD)
    assert torch.allclose(encoder(random_images(batch=2)).tokens, projected[0], atol=1e-6)


@pytest.mark.parametrize("name", ["timm", "timm_registers", "open_clip"])
@pytest.mark.parametrize("layer", [1, -1, -2])
def test_layers_of_timm_and_open_clip_are_block_outputs(name: str, layer: int) -> None:
    encoder = build_encoder(name, layer)
    vit: Any = encoder.network
    blocks = vit.transformer.resblocks if name == "open_clip" else vit.blocks
    outputs: list[Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda _, args, output: outputs.append(output))
    with torch.no_grad():
        vit(normalised(random_images()))
    expected = outputs[layer - 1 if layer > 0 else layer]
    encoded = encoder(random_images())
    assert torch.allclose(encoded.tokens, expected[:, PREFIX[name] :], atol=1e-6)
    assert torch.allclose(encoded.prefix, expected[:, : PREFIX[name]], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_grid(name: str) -> None:
    encoder = build_encoder(name)
    encoded = encoder(random_images())
    assert encoded.tokens.shape == (2, 16, 24)
    assert encoded.prefix.shape == (2, PREFIX[name], 24)
    assert encoded.grid == (4, 4)
    assert encoded.cls_attention is None
    assert (encoder.patch_size, encoder.image_size) == ((8, 8), (32, 32))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "open_clip"])
def test_other_sizes_than_the_trained_one(name: str) -> None:
    encoded = build_encoder(name)(random_images(44, 24))  # half a patch is left out
    assert encoded.grid == (5, 3)
    assert encoded.tokens.shape == (2, 15, 24)
    assert torch.allclose(
        encoded.tokens, build_encoder(name)(random_images(44, 24)[:, :, :40]).tokens
    )


@pytest.mark.parametrize("name", ["timm", "clip", "dinov2"])
def test_tokens_stand_in_raster_order_on_wide_images(name: str) -> None:
    encoder = build_encoder(name, layer=1)
    plain, changed = random_images(24, 48), random_images(24, 48)
    changed[:, :, 8:16, 32:40] += 1.0  # the patch in row 1, column 4 of 3 x 6
    difference = (encoder(plain).tokens - encoder(changed).tokens).norm(dim=-1)
    assert difference.argmax(1).tolist() == [1 * 6 + 4] * 2


def test_a_native_size_that_is_no_multiple_of_the_patch() -> None:
    options: dict[str, Any] = {
        "img_size": 36, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2
    }  # fmt: skip
    networks = []
    for dynamic in (False, True):
        torch.manual_seed(0)
        networks.append(VisionTransformer(dynamic_img_size=dynamic, **options))
    rigid, flexible = (FrozenEncoder(TimmTower(n), -1, MEAN, STD) for n in networks)
    assert torch.allclose(
        rigid(random_images(36, 36)).tokens, flexible(random_images(36, 36)).tokens
    )
    assert rigid(random_images(36, 36)).grid == (4, 4)
    with pytest.raises(ValueError, match="was built for 36 x 36"):
        rigid(random_images(32, 32))


@pytest.mark.parametrize("name", ["clip", "dinov2", "registers"])
@pytest.mark.parametrize("block", [None, 1, -3])
def test_class_attention_is_that_of_transformers(name: str, block: int | None) -> None:
    encoder = build_encoder(name, attention_layer=block)
    network: Any = encoder.network
    encoded = encoder(random_images(), attention=True)
    assert torch.equal(encoded.tokens, encoder(random_images()).tokens)
    network.set_attn_implementation("eager")
    with torch.no_grad():
        maps = network(normalised(random_images()), output_attentions=True).attentions
    chosen = maps[(3 if block is None else block) - 1 if block != -3 else -3]
    expected = chosen.mean(1)[:, 0, PREFIX[name] :]
    assert encoded.cls_attention is not None
    assert torch.allclose(encoded.cls_attention, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["timm", "timm_registers", "open_clip"])
def test_class_attention_weighs_the_values_as_the_network_does(name: str) -> None:
    """Rebuilds the class token's output of the attention module from the weights of each head."""
    encoder = build_encoder(name)
    vit: Any = encoder.network
    attention = (vit.transformer.resblocks if name == "open_clip" else vit.blocks)[2].attn
    seen: list[Tensor] = []
    attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoded = encoder(random_images(), attention=True)
    hidden = seen[0]
    if name == "open_clip":
        with torch.no_grad():
            expected = attention(hidden, hidden, hidden, need_weights=True)[1][:, 0]
    else:
        query, key, _ = attention.qkv(hidden).reshape(2, -1, 3, 2, 12).permute(2, 0, 3, 1, 4)
        query, key = attention.q_norm(query), attention.k_norm(key)
        expected = (query @ key.mT / math.sqrt(12)).softmax(-1).mean(1)[:, 0]
    assert encoded.cls_attention is not None
    assert torch.allclose(encoded.cls_attention, expected[:, PREFIX[name] :], atol=1e-6)
    assert torch.allclose(class_attention_weights(attention, hidden).sum(1), torch.ones(2))


def test_attention_without_a_class_token_is_refused() -> None:
    with pytest.raises(ValueError, match="no class token"):
        build_encoder("siglip")(random_images(), attention=True)


def test_attention_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear: class attention is not known"):
        class_attention_weights(nn.Linear(4, 4), torch.zeros(1, 2, 4))


@pytest.mark.parametrize("name", NAMES)
def test_frozen_in_evaluation_mode_and_no_part_of_a_parent(name: str) -> None:
    encoder = build_encoder(name)
    before = encoder(random_images()).tokens
    parent = nn.Sequential(nn.Linear(2, 2), encoder)
    assert list(parent.state_dict()) == ["0.weight", "0.bias"]
    assert len(list(parent.parameters())) == 2
    parent.load_state_dict(nn.Sequential(nn.Linear(2, 2)).state_dict(), strict=True)
    parent.requires_grad_().train()
    encoder.network.train()  # as the model does from whose inside the network was taken
    images = random_images().requires_grad_()
    after = encoder(images)
    assert torch.equal(after.tokens, before)
    assert not after.tokens.requires_grad
    assert not any(module.training for module in encoder.network.modules())
    assert not any(parameter.requires_grad for parameter in encoder.network.parameters())


def test_moves_and_casts_with_its_parent() -> None:
    encoder = build_encoder("timm")
    plain = encoder(random_images()).tokens
    identity = encoder.identity
    nn.Sequential(encoder).to(torch.bfloat16)
    cast = encoder(random_images()).tokens
    assert cast.dtype == torch.bfloat16
    assert (cast.float() - plain).norm() < 0.05 * plain.norm()
    assert encoder.identity != identity
    nn.Sequential(encoder).to("meta")
    assert {parameter.device.type for parameter in encoder.network.parameters()} == {"meta"}


def test_copies_and_pickles_are_the_same_encoder() -> None:
    encoder = build_encoder("timm")
    for copied in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):  # noqa: S301
        assert copied.network is not encoder.network
        assert copied.identity == encoder.identity
        assert torch.equal(copied(random_images()).tokens, encoder(random_images()).tokens)


@pytest.mark.parametrize("name", ["clip", "timm", "open_clip"])
def test_identity_changes_with_whatever_changes_the_tokens(name: str) -> None:
    encoder = build_encoder(name)
    assert len(encoder.identity) == 16
    assert build_encoder(name).identity == encoder.identity
    assert build_encoder(name, layer=3).identity == encoder.identity  # another way to say it
    others = [build_encoder(name, layer=-1)]
    others += [
        FrozenEncoder(build_tower(name, build_network(name)), -2, *v)
        for v in ((STD, STD), (MEAN,) * 2)
    ]
    changed = build_network(name)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-3
    others.append(FrozenEncoder(build_tower(name, changed), -2, MEAN, STD))
    assert len({encoder.identity, *(other.identity for other in others)}) == 5


def test_identity_tells_heads_and_activations_apart() -> None:
    identities = set()
    for options in (
        {},
        {"num_attention_heads": 4},
        {"hidden_act": "gelu"},
        {"layer_norm_eps": 1e-3},
    ):
        config = transformers.CLIPVisionConfig(intermediate_size=40, **(SIZES | IMAGE | options))
        torch.manual_seed(0)
        network = transformers.CLIPVisionModel(config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.fill_(0.5)
        identities.add(FrozenEncoder(TransformersTower(network), -1, MEAN, STD).identity)
    assert len(identities) == 4


@pytest.mark.parametrize("layer", [0, 5, -5])
def test_layers_that_do_not_exist_are_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=f"^layer={layer}: must be from 1 to 4 or from -4"):
        build_encoder("clip", layer)


def test_other_arguments_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="attention_layer=4: block 4 comes after block 3"):
        build_encoder("clip", attention_layer=4)
    with pytest.raises(ValueError, match="mean=None: the network does not state it"):
        FrozenEncoder(TransformersTower(build_network("clip")))
    with pytest.raises(ValueError, match="deviations > 0"):
        FrozenEncoder(TransformersTower(build_network("clip")), -1, MEAN, (0.0, 1.0, 1.0))
    for shape in ((2, 1, 32, 32), (3, 32, 32), (2, 3, 7, 32)):
        with pytest.raises(ValueError, match="images of shape"):
            build_encoder("clip")(torch.zeros(shape))
    for kind in (TimmTower, OpenClipTower, TransformersTower):
        with pytest.raises(ValueError, match="Linear: expected"):
            kind(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the vision model alone"):
        TransformersTower(transformers.LlamaModel(transformers.LlamaConfig(
            vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1,
        )))  # fmt: skip


def test_open_clip_takes_the_size_it_was_built_for() -> None:
    tower = OpenClipTower(OpenClipVisionTransformer((24, 40), 8, 24, 2, 2, 2.0))
    encoder = FrozenEncoder(tower, -1, MEAN, STD)
    assert encoder(random_images(24, 40)).grid == (3, 5)
    with pytest.raises(ValueError, match="was built for 24 x 40; resize"):
        encoder(random_images(40, 24))


def test_the_network_follows_the_images_to_their_device() -> None:
    encoder = build_encoder("dinov2", -1)
    assert encoder(random_images().to("meta")).tokens.device.type == "meta"
    assert next(encoder.network.parameters()).device.type == "meta"
