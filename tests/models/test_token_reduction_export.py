"""The exported program keeps the tokens that the reducer keeps."""

import importlib.util
import io

import pytest
import torch
from torch import Tensor

from models.token_reduction import export
from models.token_reduction.export import FixedReduction, export_onnx, export_program
from models.token_reduction.reducer import ReducerOrigin, TokenReducer
from models.token_reduction.selector import SelectorShape


def make_reducer(positions: str = "learned") -> TokenReducer:
    torch.manual_seed(0)
    shape = SelectorShape(16, 2, (4, 5), layers=2, positions=positions)  # type: ignore[arg-type]
    reducer = TokenReducer(shape, ReducerOrigin("encoder")).eval()
    reducer.standardiser.update(3 * torch.randn(40, 16) + 5)
    return reducer


def raw_tokens(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return 3 * torch.randn(batch, length, 16, generator=generator) + 5


@pytest.mark.parametrize("positions", ["learned", "sincos"])
@pytest.mark.parametrize("grid", [None, (3, 8)])
def test_program_keeps_what_the_reducer_keeps(positions: str, grid: tuple[int, int] | None) -> None:
    reducer = make_reducer(positions)
    program = export_program(reducer, 7, grid).module()
    for batch in (1, 2, 5):
        tokens = raw_tokens(batch, 20 if grid is None else 24)
        kept, indices, scores = program(tokens)
        expected = reducer.reduce(tokens, grid, count=7)
        assert torch.equal(kept, expected.kept)
        assert torch.equal(indices, expected.indices)
        torch.testing.assert_close(scores, expected.scores, rtol=0, atol=1e-6)


def test_program_is_saved_and_read_back_with_a_fixed_batch() -> None:
    reducer, file = make_reducer(), io.BytesIO()
    torch.export.save(export_program(reducer, 4, batch=3), file)
    file.seek(0)
    tokens = raw_tokens(3, 20)
    kept, indices, _ = torch.export.load(file).module()(tokens)
    expected = reducer.reduce(tokens, count=4)
    assert torch.equal(kept, expected.kept)
    assert torch.equal(indices, expected.indices)


def test_equal_scores_are_broken_as_in_the_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    reducer = make_reducer()
    scores = torch.randint(3, (6, 20), generator=torch.Generator().manual_seed(0)).float()
    monkeypatch.setattr(reducer, "scores", lambda tokens, grid: scores)
    tokens = raw_tokens(6, 20)
    for count in (1, 5, 9, 20):
        _, indices, _ = FixedReduction(reducer, count)(tokens)
        assert torch.equal(indices, reducer.reduce(tokens, reducer.shape.grid, count=count).indices)


@pytest.mark.parametrize("k", [0, 21])
def test_number_of_tokens_must_be_there(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k={k}: must be from 1 to the 20 tokens of \(4, 5\)"):
        export_program(make_reducer(), k)


def test_missing_onnx_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[onnx\]'") as raised:
        export_onnx(make_reducer(), 3)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript")),
    reason="needs the extra onnx",
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grid", [None, (3, 8)])
def test_onnx_program_keeps_what_the_reducer_keeps(grid: tuple[int, int] | None) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    reducer, file = make_reducer(), io.BytesIO()
    export_onnx(reducer, 7, grid).save(file)
    session = ReferenceEvaluator(onnx.load_model_from_string(file.getvalue()))
    for batch in (1, 5):
        tokens = raw_tokens(batch, 20 if grid is None else 24)
        names = ["kept", "indices", "scores"]
        kept, indices, scores = session.run(names, {"tokens": tokens.numpy()})
        expected = reducer.reduce(tokens, grid, count=7)
        assert indices.tolist() == expected.indices.tolist()
        torch.testing.assert_close(torch.as_tensor(kept), expected.kept)
        torch.testing.assert_close(torch.as_tensor(scores), expected.scores, rtol=0, atol=1e-5)
