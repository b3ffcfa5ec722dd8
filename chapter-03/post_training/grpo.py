"""Learning from rewards: group-relative policy optimisation (GRPO) and its corrections.

To each prompt the policy π writes a group of G answers o_i of n_i tokens (the stop token counts),
which get rewards r_i. An answer that did better than its group is to become likelier:

    A_i = r_i - mean(r)                       the advantage (Dr. GRPO, 2503.20783)
    w_t = π(o_t) / π_old(o_t)                 of each token; 1 in the first update
    L_t = -min(w_t A_i, clip(w_t) A_i)        PPO's clip (1707.06347, equation 7)
    L   = Σ L_t / Σ n_i                       over all answers of the step"""

import torch

from common import memory
from logprobs import per_document
from packing import packed_sequence_collate_fn
from batches import document, pack_rows

SAME = 1e-6  # rewards of a group that differ by less are the same


def live_groups(rewards):
    """Which groups (P,) of rewards (P, G) say anything: not all answers got the same."""
    return rewards.amax(1) - rewards.amin(1) > SAME


def advantages(rewards, baseline="mean", scale=False):
    """A (P, G) of rewards (P, G), a row for each prompt. `baseline` "mean" is the group's mean,
    "others" that of the other answers (RLOO, 2402.14740): then A is G/(G-1) times as large, and the
    gradient unbiased. `scale` divides by the group's standard deviation (GRPO, 2402.03300, 4.1.2),
    so that easy and hard prompts count for more. A group of equal rewards gets exactly 0."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if baseline == "others":
        centred = centred * (rewards.shape[1] / (rewards.shape[1] - 1))
    if scale:
        centred = centred / (rewards.std(1, keepdim=True) + 1e-4)
    return torch.where(live_groups(rewards)[:, None], centred, 0.0)


def divisors(lengths, limit, kind):
    """What each of N answers' losses are divided by; they have `lengths` tokens, at most `limit`.

        tokens     Σ n_i      every token counts the same (DAPO, 2503.14476, equation 12)
        constant   N · limit  whatever the lengths are, which is unbiased (Dr. GRPO)
        answers    N · n_i    every answer counts the same, a long wrong one too (GRPO, equation 3)
    """
    N = len(lengths)
    return {"tokens": [sum(lengths)] * N, "constant": [N * limit] * N,
            "answers": [N * length for length in lengths]}[kind]


def make_packs(problems, answers, rewards, options):
    """The packs of a step on --device, as `collate_answers` gives them. A group with equal rewards
    teaches nothing and is left out, yet its tokens count in the divisor; only --kl needs it."""
    divided = divisors([len(one.ids) for one in answers], options.max_new_tokens, options.divisor)
    shares = 1 / torch.tensor(divided, dtype=torch.float32)
    weights = advantages(rewards, options.baseline, options.scale_rewards).flatten() * shares
    live = live_groups(rewards).repeat_interleave(options.group) | bool(options.kl)
    kept = live.nonzero()[:, 0].tolist()
    lengths = [len(problems[n].prompt) + len(answers[n].ids) for n in kept]
    return [tuple(memory.to_device(one, options.device) for one in collate_answers(
        [problems[kept[i]] for i in rows], [answers[kept[i]] for i in rows],
        weights[live][rows], shares[live][rows]))
        for rows in pack_rows(lengths, options.batch_tokens)]


def collate_answers(problems, answers, weights, shares):
    """A pack of the documents prompt + answer; and, (T,) float32 each, "weight" and "share" (given
    by answer) and "sampled", the log p of each token when it was drawn. They lie, as labels do,
    where a token is predicted; elsewhere they are 0."""
    pack = packed_sequence_collate_fn([
        document(problem.prompt, answer.ids) for problem, answer in zip(problems, answers)])
    lengths = torch.tensor([len(one.ids) for one in answers])
    values = {"weight": weights.repeat_interleave(lengths),
              "share": shares.repeat_interleave(lengths),
              "sampled": torch.tensor([value for one in answers for value in one.log_probs])}
    nothing = torch.zeros(len(pack["labels"]))
    return pack, {name: nothing.index_put((pack["labelled"],), value.float())
                  for name, value in values.items()}


def policy_loss(pack, beside, log_p, old, log_ref, options):
    """(what this pack adds to L; how many of its tokens were clipped; the sum of their KL to ρ) of
    log π, log π_old, log ρ or None, (T,); "weight" is A_i, "share" is 1, divided by `divisors`."""
    log_ratio = log_p - old  # 0 where nothing is trained
    if options.ratio == "sequence":  # one ratio for an answer: GSPO, 2507.18071, equation 7
        live = (pack["labels"] >= 0).to(log_p.dtype)
        sums = per_document(torch.stack((log_ratio, live), 1), pack["cu_seqlens"])
        log_ratio = (sums[:, 0] / sums[:, 1].clamp(min=1)).repeat_interleave(
            pack["cu_seqlens"].diff(), output_size=len(live)) * live
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - options.epsilon, 1 + options.epsilon_high)
    gains, bounded = ratio * beside["weight"], bounded * beside["weight"]
    losses, kl = -torch.minimum(gains, bounded), log_p.new_zeros(())
    if options.kl:
        d = log_ref - log_p
        # k3, whose mean is KL(π‖ρ) (J. Schulman, "Approximating KL divergence", 2020). As a loss it
        # has the gradient of KL(ρ‖π), and k2 that of KL(π‖ρ).
        kl = d.exp() - d - 1
        cost = d.square() / 2 if options.kl_estimator == "k2" else kl
        losses = losses + options.kl * cost * beside["share"]
    return losses.sum(), (bounded < gains).sum(), kl.detach().sum()
