"""A method of one's own is a subclass in one file and an entry of `METHODS`: SimSiam (Chen, He 2021) as an example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

from leoclr_fast.cli import run_command
from leoclr_fast.config import ResultConfig
from leoclr_fast.distributed.collectives import Ranks
from leoclr_fast.method.backbone import Encoder
from leoclr_fast.method.method import Method, PartialLoss, StepTools
from leoclr_fast.method.methods import METHODS
from leoclr_fast.run.folder import RunFolder
from leoclr_fast.training.loop import pretrain
from pipelines.views import MOCOV2_VIEWS
from tests.leoclr_fast.conftest import tiny_config
from tests.leoclr_fast.pages import runs_write_pages


class SimSiam(Method):
    """Two crops, an encoder, a predictor, and a stop-gradient; no queue and no momentum encoder."""

    title = "SimSiam"
    views = MOCOV2_VIEWS
    metric_names = ("projection_std",)
    num_forwards = 6

    def __init__(self, result: ResultConfig, ranks: Ranks) -> None:
        super().__init__(result, ranks)
        dim = result.method.projection_dim
        self.encoder = Encoder(result.backbone, dim)
        self.predictor = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def losses(self, plan: Any, inputs: Sequence[Tensor], tools: StepTools) -> Iterator[PartialLoss]:
        crops, parameters = inputs
        views = [
            tools.views(crops[:, number], table, self.views[number : number + 1], plan.layout.own_sizes)
            for number, table in enumerate(parameters.chunk(2))
        ]
        encode = tools.encode(self.encoder)
        for pair in zip(*views, strict=True):  # of each micro-batch: two views [b, 3, S, S]
            projections = [encode(view) for view in pair]  # [b, D], unit rows
            first, second = (F.normalize(self.predictor(projection), dim=1) for projection in projections)
            similarities = first * projections[1].detach() + second * projections[0].detach()
            std = projections[0].detach().std(dim=0).mean()
            yield PartialLoss(-similarities.sum(dim=1).mean() / 2, len(pair[0]), [std])


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "simsiam", SimSiam)


def test_it_trains_resumes_and_is_reported(tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config("simsiam", monitor__checkpoint_every_steps=1, result__optimizer__base_lr=0.1)
    with runs_write_pages(True):
        whole = pretrain(config, tiny_data, tmp_path / "whole")
    assert whole["complete"]
    assert whole["knn_top1"] is not None
    assert (tmp_path / "whole" / "final.safetensors").exists()
    pretrain(config, tiny_data, tmp_path / "parts", max_steps=5)
    pretrain(config, tiny_data, tmp_path / "parts")
    whole_steps, parts_steps = (
        [(row["step"], row["loss"], row["projection_std"]) for row in RunFolder(tmp_path / name).read_metrics("step")]
        for name in ("whole", "parts")
    )
    assert [step for step, *_ in whole_steps] == list(range(1, 13))
    assert whole_steps == parts_steps
    assert all(-1 <= loss < 1 and std > 0 for _, loss, std in whole_steps)
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "SimSiam" in page
    assert "Finished after step 12 of 12" in page


def test_its_weights_are_evaluated_and_exported(tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(tiny_config("simsiam"), tiny_data, run, max_steps=2)
    assert run_command(["knn", str(run), f"--data={tiny_data}", "--device=cpu"]) == 0
    assert run_command(["export", str(run), "--to=safetensors", f"--out={tmp_path / 'weights.safetensors'}"]) == 0


def test_an_unknown_method_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no method 'simsam'\. Did you mean simsiam\?.*leoclr, mocov2, simsiam"):
        pretrain(tiny_config("simsam"), tiny_data, tmp_path / "run")
