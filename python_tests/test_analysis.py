"""Looking at a run: each figure against a case whose answer is known."""

import pytest
import torch

import uegr_kernels as uk


def stepped(gradients, groups=None, **options):
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    optimizer = uk.SelectiveSGD(groups(params) if groups else params, lr=1.0, seed=3, **options)
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("options", [{}, {"threshold": 0.1}, {"normalization": "rank", "direction": "salient"}, {"normalization": "range"}])
def test_the_share_is_that_of_the_elements_that_moved(options):
    torch.manual_seed(0)
    params, optimizer = stepped([torch.randn(300), torch.randn(20, 30)], **options)
    report = uk.analysis.selection_report(optimizer)
    for p, found in zip(params, report.parameters, strict=True):
        assert found.selected == pytest.approx((p != 0).double().mean().item())
        assert found.elements == p.numel() and sum(found.histogram) == p.numel()
        moved = p != 0
        assert found.largest_inverse >= (p / p.grad)[moved].max().item() * (1 - 1e-5)
    moved = sum((p != 0).sum().item() for p in params)
    assert report.selected == pytest.approx(moved / sum(p.numel() for p in params))


def test_ranges_and_quantiles_by_hand():
    _, optimizer = stepped([torch.tensor([0.0, 1.0, 2.0, 3.0, float("nan")])], normalization="constant", keep_probability=0.5)
    (found,) = uk.analysis.selection_report(optimizer).parameters
    assert (found.s_min, found.s_max, found.largest_inverse) == (0.0, 9.0, 2.0)
    assert found.s_quantiles[2] == 4.0
    assert found.histogram[10] == 4 and found.histogram[19] == 1  # what is not finite has p = 1


def test_a_global_scope_spans_the_parameters():
    small, large = torch.full((50,), 0.1), torch.linspace(0.5, 1.0, 50)
    options = {"scope": "global", "threshold": 0.5, "sharpness": 20.0}
    _, optimizer = stepped([small, large], **options)
    first, second = uk.analysis.selection_report(optimizer).parameters
    p = uk.selection_probability(torch.cat([small, large]), threshold=0.5, sharpness=20.0)
    assert first.selected == pytest.approx(p[:50].mean().item(), rel=1e-5)
    assert second.selected == pytest.approx(p[50:].mean().item(), rel=1e-5)


def test_names_groups_and_parameters_without_a_gradient(tmp_path):
    params, optimizer = stepped(
        [torch.ones(3), torch.randn(40)],
        groups=lambda params: [{"params": [("bias", params[0])]}, {"params": [("weight", params[1])], "normalization": "rank"}],
    )
    report = uk.analysis.selection_report(optimizer)
    assert [found.name for found in report.parameters] == ["bias", "weight"]
    table = str(report).splitlines()
    assert table[0].split()[0] == "parameter" and table[-1].split()[0] == "all" and len(table) == 4
    picture = uk.analysis.plot_selection_report(report, tmp_path / "selection.png")
    assert picture.read_bytes()[:4] == b"\x89PNG"
    params[0].grad = None
    assert [found.name for found in uk.analysis.selection_report(optimizer).parameters] == ["weight"]


def test_other_optimizers_are_refused():
    with pytest.raises(TypeError, match="is a AdamW; pass a SelectiveAdamW"):
        uk.analysis.selection_report(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
