"""Whole descriptions: the posterior over 25 graphs against texts scored one by one, as a term of a target too."""

import math
import string

import pytest
import torch

from retrodict.errors import InputError
from retrodict.models.tabular import TabularLM
from retrodict.records import Problem
from retrodict.spaces.dags import Dags, all_dags, rollouts_of
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.structures.ask import Asker
from retrodict.structures.describe import NULL_PROMPT, Described, Describer, and_list, by_cause, node_orders
from retrodict.targets.algebra import Target

ALPHABET = " .,:->'" + string.ascii_letters
NAMES = ("rain", "mud", "sun")


def model(order: int = 1) -> TabularLM:
    return TabularLM.random(ALPHABET, order=order, seed=4, scale=0.3)


def by_hand(lm: TabularLM, prompt: str, text: str) -> float:
    """One look-up a character in a table of order one."""
    ids = lm.tokenizer.encode(prompt + text)
    law = lm.table.log_softmax(-1)
    return sum(float(law[ids[k - 1], ids[k]]) for k in range(len(prompt), len(ids)))


def test_texts_say_the_graph():
    graph = torch.tensor([[0, 1, 1], [0, 0, 0], [0, 1, 0]]).bool()
    texts = [t for _, t in Describer(Asker(model()), NAMES).texts(graph)]
    assert texts == [
        " rain directly causes mud and sun. sun directly causes mud. There are no other direct causes.",
        " mud is directly caused by rain and sun. sun is directly caused by rain. Nothing else is caused.",
        " rain -> mud, rain -> sun, sun -> mud, and no more.",
    ]
    assert and_list(["a", "b", "c"]) == "a, b and c"
    assert [t for _, t in Describer(Asker(model()), NAMES).texts(torch.zeros(3, 3).bool())][2] == " none."


@pytest.mark.parametrize("length", ["raw", "null", "per_edge"])
def test_the_density_is_the_average_over_templates_and_orders(length):
    lm = model()
    orders = node_orders(3, 4)
    assert len(set(orders)) == 4 and orders[0] == (0, 1, 2) and len(node_orders(3, 99)) == 6
    assert len(node_orders(6, 999)) == 720
    describer = Describer(Asker(lm), NAMES, context="Weather. ", orders=orders, length=length)
    graphs, found = describer.exact(Dags(3))
    want = []
    for graph in graphs:
        scores = []
        for prompt, text in describer.texts(graph):
            s = by_hand(lm, prompt, text)
            s -= by_hand(lm, NULL_PROMPT, text) if length == "null" else 0.0
            scores.append(s / (int(graph.sum()) + 1) if length == "per_edge" else s)
        assert len(scores) == 12
        want.append(math.log(sum(math.exp(s) for s in scores) / 12))
    expected = torch.tensor(want).double().log_softmax(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    one_text = torch.stack([describer.asker.log_p(describer.texts(g)[:1]) for g in graphs]).squeeze(1).log_softmax(0)
    assert (one_text - expected).abs().max() > 1.0  # planted: a single description


def test_node_order_is_no_part_of_the_belief_when_all_are_averaged():
    asker = Asker(model(order=2))
    value = Describer(asker, NAMES, orders=node_orders(3, 6), length="raw").log_p(all_dags(3))
    turned = Describer(asker, NAMES[::-1], orders=node_orders(3, 6), length="raw").log_p(all_dags(3).flip(1, 2))
    torch.testing.assert_close(value, turned, rtol=0, atol=1e-9)
    plain = Describer(asker, NAMES, length="raw").log_p(all_dags(3))
    backwards = Describer(asker, NAMES[::-1], length="raw").log_p(all_dags(3).flip(1, 2))
    assert (plain - backwards).abs().max() > 0.1  # planted: one order only


def test_as_a_factor_it_values_every_prefix_and_asks_once():
    lm, space = model(), Dags(3, forbidden=((2, 0),))
    describer = Describer(Asker(lm), NAMES)

    class One:
        name, noise, version, prefixes = "flat", "none", "1", True

        def __call__(self, rollouts, every_prefix=False):
            b, t = rollouts.moves.shape
            return torch.zeros(b, t + 1, 1).double() if every_prefix else torch.zeros(b).double()

    target = Target(space, [Problem((), name="graphs")], {"flat": One()}) * Described(describer) ** 0.5
    graphs, log_p = describer.exact(space, alpha=0.5)
    paths = enumerate_objects(space, 0)
    share = (target.log_gamma(paths) + paths.log_pb.double().sum(1)).log_softmax(0).exp()
    key = {k: i for i, k in enumerate(space.keys(rollouts_of(space, graphs)))}
    mass = torch.zeros(len(graphs)).double().index_add(0, torch.tensor([key[k] for k in space.keys(paths)]), share)
    torch.testing.assert_close(mass, log_p.exp(), rtol=0, atol=1e-10)
    scored = describer.asker.counts.scored
    every = target.log_gamma(paths, every_prefix=True)
    assert torch.equal(every[torch.arange(len(paths)), paths.n, 0], target.log_gamma(paths))
    assert describer.asker.counts.scored == scored and every.shape[2] == 1
    assert (every[paths.n < every.shape[1] - 1][:, -1] == -torch.inf).all()


def test_bad_input():
    with pytest.raises(InputError, match="unknown length 'nul'; did you mean 'null'"):
        Describer(Asker(model()), NAMES, length="nul")
    with pytest.raises(InputError, match="at least one node order"):
        node_orders(3, 0)
    assert by_cause([("a", [])], []) == " There are no direct causes at all."
