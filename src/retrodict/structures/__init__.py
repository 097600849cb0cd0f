"""Structures: posteriors over graphs and consistent worlds, with data, a language model, or both as the evidence."""

from retrodict.spaces.dags import Dags
from retrodict.structures.ask import Asker
from retrodict.structures.bootstrap import bootstrap_graphs
from retrodict.structures.data import Table, read_csv
from retrodict.structures.describe import Described, Describer
from retrodict.structures.forms import Forms, language
from retrodict.structures.forms_parse import Parser, amortize_forms, forms_target
from retrodict.structures.law import graph_law, posterior_law, total_variation
from retrodict.structures.lm_prior import ask_edges, calibrate, edge_prior
from retrodict.structures.methods import graph_posterior
from retrodict.structures.modular import combined
from retrodict.structures.network import read_bif
from retrodict.structures.pictures import Catalogue, amortize_pictures, picture, picture_target
from retrodict.structures.posterior import GraphPosterior
from retrodict.structures.relations import Relations, Teller
from retrodict.structures.scores import bdeu, bge, bic
from retrodict.structures.strokes import Strokes
from retrodict.structures.target import graph_target
from retrodict.structures.train import amortize_graphs, data_features, graph_policy, sample_graphs
from retrodict.structures.worlds import Belief, Constraint
from retrodict.structures.worlds_ask import believed
from retrodict.structures.worlds_solve import Worlds

__all__ = [
    "Asker",
    "Belief",
    "Catalogue",
    "Constraint",
    "Dags",
    "Described",
    "Describer",
    "Forms",
    "GraphPosterior",
    "Parser",
    "Relations",
    "Strokes",
    "Table",
    "Teller",
    "Worlds",
    "amortize_forms",
    "amortize_graphs",
    "amortize_pictures",
    "ask_edges",
    "bdeu",
    "believed",
    "bge",
    "bic",
    "bootstrap_graphs",
    "calibrate",
    "combined",
    "data_features",
    "edge_prior",
    "forms_target",
    "graph_law",
    "graph_policy",
    "graph_posterior",
    "graph_target",
    "language",
    "picture",
    "picture_target",
    "posterior_law",
    "read_bif",
    "read_csv",
    "sample_graphs",
    "total_variation",
]
