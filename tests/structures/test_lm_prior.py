"""The edge prior: biases of wording cancel, calibration fits, and the modular form is the product of edges."""

import itertools

import pytest
import torch

from retrodict.errors import InputError
from retrodict.models.tiny import TinyLM
from retrodict.rng import generator
from retrodict.spaces.dags import all_dags, parent_masks
from retrodict.structures.ask import Asker
from retrodict.structures.lm_prior import VERBS, Calibration, EdgePrior, ask_edges, calibrate, edge_prior, phrases_of
from retrodict.structures.modular import Modular

NAMES = ("rain", "wet_grass", "sprinkler")
TRUTH = torch.tensor([[0.0, 2.0, -1.0], [-3.0, 0.0, -2.0], [0.5, 1.5, 0.0]]).double()


class Partial(Asker):
    """Answers with TRUTH, plus a liking for what is named first, for a verb, and for yes."""

    def __init__(self, first: float, verb: float, yes: float) -> None:
        super().__init__(TinyLM(alphabet=" yesno"))
        self.bias = (first, verb, yes)

    def log_p(self, pairs):
        words = [n.replace("_", " ") for n in NAMES]
        out = []
        for prompt, text in pairs:
            found = sorted((k for k in range(3) if words[k] in prompt), key=lambda k: prompt.index(words[k]))
            odds = float(TRUTH[found[0], found[1]]) if len(found) == 2 else 0.0
            first, verb, yes = self.bias
            odds += yes + verb * VERBS.index(next(v for v in VERBS if f" {v} " in prompt))
            odds += first if "Answer yes or no" in prompt else -first
            odds = torch.tensor(odds if text == " yes" else -odds)
            out.append(float(torch.nn.functional.logsigmoid(odds)) - 1.0)  # a share 1 - 1/e goes elsewhere
        return torch.tensor(out).double()


def test_order_verb_and_yes_biases_cancel():
    answers = ask_edges(Partial(1.5, 0.3, 0.7), NAMES)
    torch.testing.assert_close(answers.log_odds(), TRUTH, rtol=0, atol=1e-5)
    one_order = [k for k, (_, first) in enumerate(answers.forms) if first == "yes"]
    alone = answers.each[:, :, one_order].mean(2)  # planted: one order, no null
    assert (alone - TRUTH).abs().max() > 1.5
    off = ~torch.eye(3, dtype=torch.bool)
    assert torch.allclose(answers.outside[off], torch.tensor(1 - 2.718281828**-1.0).double(), atol=1e-6)
    rows = answers.rows()
    assert len(rows) == 6 * len(VERBS) * 2 and rows[0]["cause"] == "rain" and rows[0]["null"] != 0


def test_the_prior_is_the_product_of_its_edges():
    log_odds = torch.randn(4, 4, generator=generator(3)).double()
    prior = EdgePrior(log_odds, alpha=0.3)
    assert isinstance(prior, Modular) and prior.d == 4
    graphs = all_dags(4)
    masks = parent_masks(graphs)
    child = torch.arange(4).repeat(len(graphs))
    found = prior.gather(child, masks.flatten()).view(-1, 4).sum(1)
    p, off = torch.sigmoid(log_odds), ~torch.eye(4, dtype=torch.bool)
    each = torch.where(graphs, p.log(), (1 - p).log())[:, off]
    torch.testing.assert_close(found, 0.3 * each.sum(1), rtol=0, atol=1e-10)
    assert EdgePrior(log_odds, 0.0).gather(child, masks.flatten()).abs().max() == 0


def test_at_alpha_one_it_is_normalised_over_all_directed_graphs():
    prior = EdgePrior(TRUTH)
    values = []
    for masks in itertools.product(*([m for m in range(8) if not m >> j & 1] for j in range(3))):
        values.append(prior.gather(torch.arange(3), torch.tensor(masks)).sum())
    assert abs(float(torch.stack(values).logsumexp(0))) < 1e-12


def test_calibration_finds_slope_and_bias():
    gen = generator(5)
    x = 2 * torch.randn(60, 60, generator=gen).double()
    y = torch.rand(60, 60, generator=gen).double() < torch.sigmoid(0.6 * x - 1.2)
    found = calibrate([(x[:30, :30], y[:30, :30]), (x, y)])
    assert abs(found.slope - 0.6) < 0.1 and abs(found.bias + 1.2) < 0.15
    backwards = calibrate([(x, torch.rand(60, 60, generator=gen).double() < torch.sigmoid(-x - 1.0))])
    assert backwards.slope == 0.0 and -1.2 < backwards.bias < 0.0
    sure = calibrate([(TRUTH, TRUTH > 0)])  # separable: still finite
    assert 1.0 < sure.slope < 100.0


def test_from_a_model_to_a_prior():
    alphabet = "".join(sorted({*"XY? aAnswer or yes/nN.:Question: Does one thing another bcdg", *"".join(VERBS)}))
    lm = TinyLM(alphabet=alphabet, seed=1)
    answers = ask_edges(Asker(lm), {"b": "a bad dog", "c": "a cat"}, verbs=VERBS[:2], question="Does {cause} {verb} "
                        "{effect}? {first}/{second}:")  # fmt: skip
    prior = edge_prior(answers, alpha=0.5, calibration=Calibration(2.0, -1.0))
    torch.testing.assert_close(prior.log_odds, 2.0 * answers.log_odds() - 1.0)
    assert prior.alpha == 0.5 and "0.5" in prior.version and prior.version != edge_prior(answers).version


def test_bad_input():
    with pytest.raises(InputError, match="at least two"):
        phrases_of(["a"])
    with pytest.raises(InputError, match="both called 'smoke'"):
        phrases_of({"a": "smoke", "b": "smoke"})
    with pytest.raises(InputError, match="alpha must be"):
        EdgePrior(TRUTH, alpha=-1.0)
