"""Classical latent-variable models under the nouns of the rest: mixtures, hidden Markov models, grammars, topics, VAEs.

Each has an exact or trusted reference beside it. Import what you need: ``from retrodict.latent.mixture import ...``.
"""
