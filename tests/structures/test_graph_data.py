"""Tables and networks: what files are read as, what is refused and in which words."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from retrodict.errors import InputError
from retrodict.structures.data import Table, read_csv, read_edges
from retrodict.structures.network import read_bif

BIF = """network small { }
variable rain { type discrete [ 2 ] { yes, no }; property a = b ; }
variable sprinkler { type discrete [ 2 ] { on, off }; }
variable grass { type discrete [ 3 ] { dry, damp, wet }; }
probability ( rain ) { table 0.2, 0.8; }
probability ( sprinkler | rain ) { (yes) 0.01, 0.99; (no) 0.4, 0.6; }
probability ( grass | sprinkler, rain ) {
  (on, yes) 0.0, 0.1, 0.9;
  (on, no) 0.1, 0.3, 0.6;
  (off, yes) 0.2, 0.3, 0.5;
  default 1.0, 0.0, 0.0;
}
"""


def write(folder: Path, text: str, name: str = "data.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_numbers_and_categories(tmp_path: Path) -> None:
    numbers = read_csv(write(tmp_path, "a;b\n1.5;2\n-1;3\n0;2e1\n7;1\n8;9\n10;4\n"))
    assert not numbers.discrete and numbers.values[:3].tolist() == [[1.5, 2], [-1, 3], [0, 20]]
    assert torch.allclose(numbers.standardised().values.std(0), torch.ones(2).double())
    words = read_csv(write(tmp_path, "\ufeffa\tb\nx\t10\ny\t9\nx\t10\n"))
    assert (
        words.discrete
        and words.levels == (("x", "y"), ("9", "10"))
        and words.values.tolist() == [[0, 1], [1, 0], [0, 1]]
    )
    assert read_csv(write(tmp_path, "a,b\n1,2\n2,1\n"), kind="continuous").values.dtype == torch.float64


def test_a_column_says_what_was_set(tmp_path: Path) -> None:
    path = write(tmp_path, "a,who,b\n1.0,b,2\n2.5,,3\n3,a,8\n4,none,1\n5,b,0\n9,b,7\n")
    table = read_csv(path, intervened="who")
    assert table.names == ("a", "b") and table.intervened is not None
    assert table.intervened.tolist() == [[False, True], [False, False], [True, False], [False, False], [False, True],
                                         [False, True]]  # fmt: skip
    part = table.rows(torch.tensor([2, 2, 0]))
    assert part.intervened is not None and part.intervened.tolist() == [[True, False], [True, False], [False, True]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n3,\n5,NA\n", "row 2, column 'b' is missing .2 cells are missing in all.; fill it in or remove"),
        ("a,b\n1.5,2\n3,x\n5,1\n1,2\n1,3\n1,4\n1,5\n1,7\n", "column 'b' is not numeric .row 2: 'x'.; remove it"),
        ("a,b\n1,2\n3,2\n5,2\n", "column 'b' is constant"),
        ("a,b,c\n1,2,4\n3,1,9\n", "2 rows for 3 variables: give more rows"),
        ("a,b\n1,2\n3\n", "row 2 has 1 cells, the header 2"),
        ("a,a\n1,2\n3,2\n", "two columns are called 'a'"),
        ("a,\n1,2\n3,2\n", "column 2 has no name"),
        ("a\n1\n2\n", "needs a header of at least two names"),
        ("a,b\n1,2\ninf,3\n", "infinite"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, text: str, words: str) -> None:
    kind = "continuous" if "x" not in text else "auto"
    with pytest.raises(InputError, match=words) as told:
        read_csv(write(tmp_path, text), kind=kind)
    assert "\n" not in str(told.value)


def test_few_rows_can_be_accepted_and_names_are_checked(tmp_path: Path) -> None:
    assert len(read_csv(write(tmp_path, "a,b,c\n1,2,4\n3,1,9\n"), few_rows=True)) == 2
    for call, words in [
        (lambda: read_csv(tmp_path / "none.csv"), "cannot read .*none.csv: No such file"),
        (lambda: read_csv(write(tmp_path, "a,b\n1,2\n2,1\n"), kind="discreet"), "did you mean 'discrete'"),
        (lambda: read_csv(write(tmp_path, "a,b\n1,2\n2,1\n"), intervened="c"), "no column 'c'"),
        (
            lambda: read_csv(write(tmp_path, "a,b,i\n1,2,bb\n2,1,\n"), intervened="i"),
            "'bb' was set, which is no column",
        ),
        (lambda: read_edges(write(tmp_path, "x,y\nrain,gras\n"), ("rain", "grass")), "did you mean 'grass'"),
        (lambda: Table(torch.zeros(3, 2), ("a",)), "needs as many columns"),
    ]:
        with pytest.raises(InputError, match=words):
            call()
    graph = read_edges(write(tmp_path, '"Cause","Effect"\n"rain","grass"\n'), ("grass", "rain"))
    bare = read_edges(write(tmp_path, "a,b\nb,c\n", "bare.csv"), ("a", "b", "c"))
    assert bare.nonzero().tolist() == [[0, 1], [1, 2]]  # without a header no edge is lost
    assert graph.tolist() == [[False, False], [True, False]]


def test_a_network_is_read_and_sampled_by_its_tables(tmp_path: Path) -> None:
    path = tmp_path / "small.bif.gz"
    path.write_bytes(gzip.compress(BIF.encode()))
    net = read_bif(path)
    assert net.names == ("rain", "sprinkler", "grass") and net.levels[2] == ("dry", "damp", "wet")
    assert net.edges == (("rain", "sprinkler"), ("sprinkler", "grass"), ("rain", "grass"))
    assert net.graph.nonzero().tolist() == [[0, 1], [0, 2], [1, 2]]
    n = 40_000
    table = net.sample(n, 0)
    assert torch.equal(table.values, net.sample(n, 0).values) and table.levels == net.levels
    joint = torch.zeros(2, 2, 3, dtype=torch.float64)
    joint.index_put_(tuple(table.values.T), torch.tensor(1.0 / n, dtype=torch.float64), accumulate=True)
    rain = torch.tensor([0.2, 0.8]).double()[:, None, None]
    sprinkler = torch.tensor([[0.01, 0.99], [0.4, 0.6]]).double()[:, :, None]
    grass = torch.tensor([[[0.0, 0.1, 0.9], [0.2, 0.3, 0.5]], [[0.1, 0.3, 0.6], [1.0, 0.0, 0.0]]]).double()
    want = rain * sprinkler * grass
    assert ((joint - want).abs() <= 4.5 * (want * (1 - want) / n).sqrt()).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("( rain ) {", "( snow ) {"), "a probability of 'snow', which is no variable"),
        (("( rain ) {", "( ) {"), "a probability of nothing"),
        (("table 0.2, 0.8", "table 0.2, 0.7"), "probabilities of 'rain'"),
        (("table 0.2, 0.8", "table 0.2, x"), "'rain' has probabilities that are no numbers: 0.2, x"),
        (("default 1.0, 0.0, 0.0", "default 1.0, 0.0"), "a row of 'grass' has 2 numbers, not 3"),
        (("  default 1.0, 0.0, 0.0;\n", ""), "probabilities of 'grass' do not cover every state"),
        (("(on, yes)", "(maybe, yes)"), "has a row for .maybe, yes."),
        (("probability ( rain ) { table 0.2, 0.8; }", ""), "no probability for 'rain'"),
        (("variable", "thing"), "no variables found"),
    ],
)
def test_a_damaged_network_is_refused(tmp_path: Path, change: tuple[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_bif(write(tmp_path, BIF.replace(*change), "small.bif"))
