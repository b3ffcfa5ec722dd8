"""Learning from pairs of answers, of which one was chosen and one rejected: DPO and its kin.

For a prompt x with the answers y_w (chosen) and y_l (rejected), the policy π, which is trained, and
a frozen reference ρ:

    log π(y|x) = Σ_t log π(y_t | x, y_<t)    over the answer's n tokens, its end-of-turn included
    s = log π(y|x) - log ρ(y|x)              β s is the answer's implicit reward (DPO, section 4)
    Δ = s_w - s_l                            β Δ is the margin
    m = s / n      a = log π(y|x) / n        the same per token: m needs the reference, a does not
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from logprobs import per_document
from packing import IGNORE, packed_sequence_collate_fn

SCORES = ("loss", "reward_chosen", "reward_rejected", "margin", "pair_accuracy", "logp_chosen",
          "logp_rejected", "tokens_chosen", "tokens_rejected")


class PairLogProbs(NamedTuple):
    """What a loss sees of P pairs, each (P, 2) float32: column 0 is the chosen answer."""

    policy: Tensor  # log π(y|x)
    reference: Tensor | None  # log ρ(y|x); None for a loss that needs none
    tokens: Tensor  # n

    @classmethod
    def of(cls, pack, policy, reference=None):
        """From log p of each token, (T,), of a pack from `collate_pairs`."""
        def by_pair(values):
            sums = per_document(values, pack["cu_seqlens"])
            return sums[:len(sums) // 2 * 2].view(-1, 2)  # an odd one says nothing

        labelled = (pack["labels"] >= 0).to(policy.dtype)
        return cls(by_pair(policy), None if reference is None else by_pair(reference),
                   by_pair(labelled))

    @property
    def s(self):
        return self.policy - self.reference

    @property
    def delta(self):
        return difference(self.s)

    @property
    def a(self):
        return self.policy / self.tokens

    @property
    def m(self):
        return self.s / self.tokens


def difference(values):
    """Chosen less rejected, (P,), of (P, 2)."""
    return values[:, 0] - values[:, 1]


def log_odds(a):
    """log p / (1 - p) of p = e^a, for a < 0; a token can be so likely that float32 has 1 for it."""
    return a - (-torch.expm1(a.clamp(max=-1e-6))).log()


# name: the loss of each pair, (P,), of q, `PairLogProbs`, and o, the run's options: β is --beta, ε
# is --label-smoothing, γ is --gamma.
LOSSES = {
    # -log σ(β Δ)                                    DPO, arXiv 2305.18290, equation 7
    "dpo": lambda q, o: -logsigmoid(o.beta * q.delta),
    # -(1-ε) log σ(β Δ) - ε log σ(-β Δ)              cDPO: E. Mitchell, "A note on DPO with noisy
    #                                                preferences", 2023
    "cdpo": lambda q, o: (-(1 - o.label_smoothing) * logsigmoid(o.beta * q.delta)
                          - o.label_smoothing * logsigmoid(-o.beta * q.delta)),
    # (-(1-ε) log σ(β Δ) + ε log σ(-β Δ)) / (1-2ε)   the same without bias: robust DPO, 2403.00409
    "robust": lambda q, o: (-(1 - o.label_smoothing) * logsigmoid(o.beta * q.delta)
                            + o.label_smoothing * logsigmoid(-o.beta * q.delta)
                            ) / (1 - 2 * o.label_smoothing),
    # max(0, 1 - β Δ)                                SLiC, 2305.10425; RSO, 2309.06657
    "hinge": lambda q, o: relu(1 - o.beta * q.delta),
    # (m_w - m_l - 1/(2β))²                          IPO, 2310.12036, equation 17, per token
    "ipo": lambda q, o: (difference(q.m) - 1 / (2 * o.beta)).square(),
    # -log σ(β (m_w - m_l))                          length-normalised DPO, Tülu 3, 2411.15124
    "dpo-norm": lambda q, o: -logsigmoid(o.beta * difference(q.m)),
    # 1 - σ(β s_w) + σ(β s_l)                        APO-zero, 2408.06266, equation 7
    "apo-zero": lambda q, o: 1 - (o.beta * q.s[:, 0]).sigmoid() + (o.beta * q.s[:, 1]).sigmoid(),
    # -log σ(β (a_w - a_l) - γ)                      SimPO, 2405.14734, equation 6
    "simpo": lambda q, o: -logsigmoid(o.beta * difference(q.a) - o.gamma),
    # -a_w - β log σ(odds_w - odds_l)                ORPO, 2403.07691, equations 6 and 7
    "orpo": lambda q, o: -q.a[:, 0] - o.beta * logsigmoid(difference(log_odds(q.a))),
}
NO_REFERENCE = ("simpo", "orpo")
# Options that only some losses read: these losses, and the default.
READ_BY = {"label_smoothing": (("cdpo", "robust"), 0.1), "gamma": (("simpo",), 1.0)}


def preference_loss(pairs, options):
    """(the loss of each pair (P,), the sums of `SCORES` over the pairs, detached). `options` has
    loss (a key of LOSSES), beta, label_smoothing, gamma, and nll: λ of the term λ (-a_w), the
    chosen answer's cross-entropy per token (RPO, 2404.19733). A tie is half a pair won."""
    losses = LOSSES[options.loss](pairs, options) - options.nll * pairs.a[:, 0]
    rewards = options.beta * (pairs.a if options.loss in NO_REFERENCE else pairs.s)
    margin = difference(rewards)
    won = (margin > 0).float() + (margin == 0).float() / 2
    scores = (losses, *rewards.t(), margin, won, *pairs.policy.t(), *pairs.tokens.t())
    return losses, torch.stack([score.detach().sum() for score in scores])


def collate_pairs(pairs):
    """A pack of pairs, each (chosen, rejected), documents as (input_ids, labels): c₀ r₀ c₁ r₁ and
    so on, each with its own copy of the prompt. Of an empty list it is a token without a label: a
    rank that has no pair takes part in the step all the same."""
    nothing = torch.zeros(1, dtype=torch.int64), torch.full((1,), IGNORE)
    return packed_sequence_collate_fn([one for pair in pairs for one in pair] or [nothing])
