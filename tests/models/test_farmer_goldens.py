"""Reference cases: the official TarFlow code, and float64 mixtures written from the paper."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from lightning_modules.schedules import cosine, warmup_cosine
from models.farmer.affine_block import FlowShape
from models.farmer.checkpoint import export_tarflow, load_tarflow
from models.farmer.dequantization import bits_per_dim
from models.farmer.flow import AutoregressiveFlow
from models.farmer.flow_guidance import FlowGuidance
from models.farmer.guidance import resampling_log_weights
from models.farmer.mixture import Mixture, mixture_from_raw
from models.farmer.patches import patchify, unpatchify

GOLDENS = Path(__file__).parents[1] / "goldens" / "farmer"
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def read_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a golden case."""
    return json.loads((GOLDENS / f"{name}.json").read_text()), load_file(
        GOLDENS / f"{name}.safetensors"
    )


def rule_v1(key: str, shape: list[int]) -> Tensor:
    """Weights of a golden case, a function of key and shape."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    noise = torch.randn(shape, generator=generator)
    if key == "var":
        return torch.ones(shape)
    if key.endswith("attn_mask"):
        return torch.ones(shape).tril()
    if len(shape) >= 2:
        scale = 0.15 if key.endswith("proj_out.weight") else 1.0
        return scale * noise / math.sqrt(max(1, math.prod(shape[1:])))
    if key.endswith("weight") and "norm" in key:
        return 1 + 0.1 * noise
    return 0.02 * noise


def build_flow(case: dict[str, Any]) -> AutoregressiveFlow:
    """Flow of a TarFlow case with its weights loaded by official key."""
    config = case["config"]
    tokens = (config["img_size"] // config["patch_size"]) ** 2
    flow = AutoregressiveFlow(
        FlowShape(
            config["num_blocks"],
            config["layers_per_block"],
            config["channels"],
            head_dim=config["head_dim"],
            class_conditional=config["num_classes"] > 0,
        ),
        tokens,
        config["in_channels"] * config["patch_size"] ** 2,
        config["num_classes"],
    )
    state = {key: rule_v1(key, shape) for key, shape in case["state_dict"].items()}
    imported = load_tarflow(flow, state)
    assert imported.prior_variance is not None
    assert len(imported.ignored) == config["num_blocks"]
    exported = export_tarflow(flow)
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], state[key]) for key in state)
    return flow


@pytest.mark.parametrize("name", ["tarflow_16_p4", "tarflow_16_p4_classes"])
def test_flow_equals_official_tarflow(name: str) -> None:
    case, tensors = read_case(name)
    tolerance = {"atol": case["tolerance"]["atol"], "rtol": case["tolerance"]["rtol"]}
    flow = build_flow(case)
    tokens = patchify(tensors["x"], case["config"]["patch_size"])
    labels = tensors.get("y")
    z = tokens
    dims = tokens[0].numel()
    for index, block in enumerate(flow.blocks):
        z, log_det, _ = block(z, labels)
        assert_close(z, tensors[f"expected_block_output.{index}"], **tolerance)
        assert_close(log_det / dims, tensors["expected_logdet_per_block"][index], atol=2e-6, rtol=0)
    out = flow(tokens, labels)
    assert_close(out.tokens, tensors["expected_z"], **tolerance)
    assert_close(out.log_det / dims, tensors["expected_logdet"], atol=2e-6, rtol=0)
    loss = 0.5 * out.tokens.square().mean() - (out.log_det / dims).mean()
    assert_close(loss.view(1), tensors["expected_loss"], **tolerance)
    loss.backward()
    gradients = {
        "grad.blocks.0.proj_in.weight": flow.blocks[0].proj_in.weight.grad,
        "grad.blocks.3.proj_out.weight": flow.blocks[3].proj_out.weight.grad,
        "grad.blocks.1.pos_embed": flow.blocks[1].positions.grad,
        "grad.blocks.0.attn_blocks.0.attention.qkv.bias": flow.blocks[0]
        .transformer.layers[0]
        .attention.qkv.bias.grad,
    }
    if "grad.blocks.0.class_embed" in tensors:
        gradients["grad.blocks.0.class_embed"] = flow.blocks[0].classes.grad.unsqueeze(1)
    for key, gradient in gradients.items():
        assert_close(gradient, tensors[key], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", ["tarflow_16_p4", "tarflow_16_p4_classes"])
def test_inverse_equals_official_tarflow(name: str) -> None:
    case, tensors = read_case(name)
    flow = build_flow(case)
    patch, size = case["config"]["patch_size"], case["config"]["img_size"]
    latent = tensors["z_sample"].clone()
    labels = tensors.get("y_sample")

    def invert(guidance: FlowGuidance | None = None) -> Tensor:
        tokens, _ = flow.inverse(latent, labels, guidance=guidance)
        return unpatchify(tokens, patch, size)

    assert_close(invert(), tensors["expected_sample"], atol=2e-4, rtol=1e-3)
    assert torch.equal(latent, tensors["z_sample"])
    if labels is not None:
        scale = case["config"]["guidance"]
        guided = invert(FlowGuidance(scale))
        assert_close(guided, tensors["expected_sample_guided"], atol=2e-4, rtol=1e-3)
        annealed = invert(FlowGuidance(scale, annealed=True))
        assert_close(annealed, tensors["expected_sample_guided_annealed"], atol=2e-4, rtol=1e-3)
    back, _ = flow.inverse(tensors["expected_z"], tensors.get("y"))
    assert_close(unpatchify(back, patch, size), tensors["x"], atol=2e-4, rtol=1e-3)


def tolerance_of(dtype: torch.dtype) -> dict[str, float]:
    """Tolerance of the mixture cases."""
    return {"atol": 1e-9, "rtol": 1e-9} if dtype == torch.float64 else {"atol": 1e-3, "rtol": 1e-4}


@PRECISIONS
@pytest.mark.parametrize("name", ["gmm_k4_d3", "gmm_k1_d5"])
def test_mixture_equals_reference(name: str, dtype: torch.dtype) -> None:
    case, tensors = read_case(name)
    config, tolerance = case["config"], tolerance_of(dtype)
    raw = tensors["params"].to(dtype).requires_grad_()
    values = tensors["z"].to(dtype).requires_grad_()
    mixture = mixture_from_raw(raw, config["K"], config["d"])
    log_prob = mixture.log_prob(values)
    assert_close(log_prob, tensors["expected_log_prob"].to(dtype), **tolerance)
    assert_close(mixture.scales, tensors["expected_sigma"].to(dtype), **tolerance)
    tempered = mixture.tempered(config["T_pi"], config["T_sigma"])
    expected = tensors["expected_log_prob_tempered"].to(dtype)
    assert_close(tempered.log_prob(values), expected, **tolerance)
    log_prob.sum().backward()
    assert_close(raw.grad, tensors["expected_grad_params"].to(dtype), **tolerance)
    assert_close(values.grad, tensors["expected_grad_z"].to(dtype), **tolerance)


@PRECISIONS
def test_shared_mixture_equals_reference(dtype: torch.dtype) -> None:
    case, tensors = read_case("gmm_shared_n64")
    config, tolerance = case["config"], tolerance_of(dtype)
    raw = tensors["params"].to(dtype).requires_grad_()
    mixture = mixture_from_raw(raw, config["K"], config["d"])
    log_prob = mixture.log_prob_shared(tensors["z"].to(dtype))
    assert_close(log_prob, tensors["expected_log_prob"].to(dtype), **tolerance)
    assert_close(log_prob.sum(1), tensors["expected_log_prob_sum"].to(dtype), **tolerance)
    log_prob.sum().backward()
    assert_close(raw.grad, tensors["expected_grad_params"].to(dtype), **tolerance)


@PRECISIONS
def test_joint_likelihood_equals_reference(dtype: torch.dtype) -> None:
    case, tensors = read_case("gmm_joint")
    config, tolerance = case["config"], tolerance_of(dtype)
    known, rest = tensors["z"].to(dtype).split([config["d_I"], config["d_R"]], -1)
    informative = mixture_from_raw(
        tensors["params_informative"].to(dtype), config["K_I"], config["d_I"]
    ).log_prob(known)
    redundant = mixture_from_raw(
        tensors["params_redundant"].to(dtype), config["K_R"], config["d_R"]
    ).log_prob_shared(rest)
    assert_close(informative, tensors["expected_log_prob_informative"].to(dtype), **tolerance)
    assert_close(redundant, tensors["expected_log_prob_redundant"].to(dtype), **tolerance)
    total = informative.sum(1) + redundant.sum(1) + tensors["logdet"].to(dtype)
    assert_close(total, tensors["expected_log_prob"].to(dtype), **tolerance)
    dims = config["N"] * config["d"]
    assert_close(-total / dims, tensors["expected_nats_per_dim"].to(dtype), **tolerance)
    bits = bits_per_dim(total, dims, 256)
    assert_close(bits, tensors["expected_bits_per_dim_uniform"].to(dtype), **tolerance)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_resampling_weights_equal_reference(dtype: torch.dtype, atol: float) -> None:
    case, tensors = read_case("cfg_gaussian")
    tensors = {key: value.to(dtype) for key, value in tensors.items()}

    def gaussian(kind: str) -> Mixture:
        mean, std = tensors[f"mu_{kind}"], tensors[f"sigma_{kind}"]
        return Mixture(torch.zeros_like(mean)[:, None], mean[:, None, None], std[:, None, None])

    candidates = tensors["candidates"].unsqueeze(-1)
    ratio = gaussian("c").log_prob_shared(candidates) - gaussian("u").log_prob_shared(candidates)
    assert_close(ratio, tensors["expected_log_ratio"], atol=atol, rtol=atol)
    weights = torch.stack(
        [
            resampling_log_weights(row, float(scale), case["config"]["n_cond"])
            for row, scale in zip(ratio, tensors["w"], strict=True)
        ]
    )
    assert_close(weights, tensors["expected_log_weights"], atol=atol, rtol=atol)
    probabilities = (case["config"]["T_s"] * weights).softmax(-1)
    assert_close(probabilities, tensors["expected_probs"], atol=atol, rtol=atol)


def test_schedules_equal_reference() -> None:
    case, tensors = read_case("schedule_default")
    c = case["config"]
    steps = tensors["step"].tolist()
    sigma = [cosine(s, c["total_steps"], c["sigma_start"], c["sigma_end"]) for s in steps]
    rates = [
        warmup_cosine(s, c["total_steps"], c["warmup_steps"], c["lr_max"], c["lr_min"])
        for s in steps
    ]
    expected = {"atol": 1e-12, "rtol": 1e-9}
    double = torch.float64
    assert_close(torch.tensor(sigma, dtype=double), tensors["expected_noise_sigma"], **expected)
    assert_close(torch.tensor(rates, dtype=double), tensors["expected_lr"], **expected)
