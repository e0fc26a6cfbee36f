"""One episode of ATHA, TIR, SVL and RA in plain loops, to be read beside the papers.

No episode axis, no hooks, no batches: one text, one picture, one token at a time. Of CLIP's own towers,
without dropout and schedules. w: weights by OpenAI's names, with q, k and v apart; r: the recipe; on: what of
the method acts. The tests hold train.adapt to it.
"""
import math

import torch
import torch.nn.functional as F

HALVES = {"atha": "pull push", "atha-pull": "pull", "atha-push": "push", "tir": "inhibit enhance",
          "tir-inhibit": "inhibit", "tir-enhance": "enhance", "svl": "svl-only ra-only"}


def linear(w, name, x):
    return x @ w[name + ".weight"].T + w[name + ".bias"]


def layer_norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"])


def block(w, name, x, causal):
    """A transformer block on the tokens (T, D) of one picture or text."""
    y, heads = layer_norm(w, f"{name}.ln_1", x), []
    q, k, v = (linear(w, f"{name}.attn.{which}_proj", y) for which in "qkv")
    for head in range(0, x.shape[1], 64):
        scores = q[:, head: head + 64] @ k[:, head: head + 64].T / 8
        later = torch.full_like(scores, -math.inf).triu(1) if causal else 0
        heads.append((scores + later).softmax(1) @ v[:, head: head + 64])
    x = x + linear(w, f"{name}.attn.out_proj", torch.cat(heads, 1))
    y = linear(w, f"{name}.mlp.c_fc", layer_norm(w, f"{name}.ln_2", x))
    return x + linear(w, f"{name}.mlp.c_proj", y * (1.702 * y).sigmoid())


def encode_text(w, ids, context, layers):
    """Token ids (T,) of one text -> its feature (embed,) as each block would give it; the last is CLIP's."""
    x, features = w["token_embedding.weight"][ids], []
    x = torch.cat([x[:1], context, x[1 + len(context):]]) + w["positional_embedding"][: len(ids)]
    for layer in range(layers):
        x = block(w, f"transformer.resblocks.{layer}", x, causal=True)
        features.append(layer_norm(w, "ln_final", x[ids.argmax()]) @ w["text_projection"])
    return features


def encode_picture(w, picture, texts, alpha, beta, r, on):
    """One picture (3, S, S) -> its feature (embed,), of unit length. texts (N, embed): for ATHA and TIR."""
    kernel = w["visual.conv1.weight"]
    patches = F.conv2d(picture[None], kernel, stride=kernel.shape[-1])[0].flatten(1).T
    x = torch.cat([w["visual.class_embedding"][None], patches]) + w["visual.positional_embedding"]
    x = layer_norm(w, "visual.ln_pre", x)
    for layer in range(len(alpha)):
        if {"pull", "push"} & on:
            x = pull_and_push(x, texts_in_token_space(w, texts, r), alpha[layer], beta[layer], r)
        if {"inhibit", "enhance"} & on and layer in [at * len(alpha) // 12 for at in r.tir_blocks]:
            x = recalibrate(w, x, texts, r, on)
        x = block(w, f"visual.transformer.resblocks.{layer}", x, causal=False)
    return F.normalize(layer_norm(w, "visual.ln_post", x[0]) @ w["visual.proj"], dim=0)


def texts_in_token_space(w, texts, r):
    """Class texts T (N, embed) -> T' (N, D)."""
    if r.text_to_tokens == "paper":
        return F.layer_norm(texts, texts.shape[-1:]) @ w["visual.proj"].T
    least_squares = texts @ torch.linalg.pinv(w["visual.proj"])
    return (least_squares - w["visual.ln_post.bias"]) / w["visual.ln_post.weight"]


def pull_and_push(x, goals, alpha, beta, r):
    """ATHA, section 3: [CLS] and patches (1+L, D) of one picture, goals T' (N, D)."""
    x = torch.cat([x[:1], x]) if r.copy_cls else x
    new, length = list(x), len(x) - 1
    s = torch.stack([F.cosine_similarity(x[1:], goal[None], dim=1) for goal in goals], 1).detach()   # (L, N)
    order = s.amax(1).argsort(descending=True).tolist()
    for i in order[: math.floor(r.rho * length)]:                         # head: like some text
        new[1 + i] = new[1 + i] + alpha * goals[s[i].argmax()]
    for i in order[length - math.floor(r.gamma * length):]:               # tail: like none
        new[1 + i] = new[1 + i] - beta * goals[s[i].argmin()]
    return torch.stack(new)


def recalibrate(w, x, texts, r, on):
    """TIR, section 3: weigh each patch by how many classes have it among the patches most like them."""
    z, count = layer_norm(w, "visual.ln_post", x[1:]) @ w["visual.proj"], [0] * (len(x) - 1)
    for text in texts:
        for i in F.cosine_similarity(z, text[None], dim=1).topk(math.floor(r.tir_top * len(z))).indices:
            count[i] += 1
    new, n = list(x), len(texts)
    for i, marks in enumerate(count):
        weight = 1 - 2 / (n - 1) * (marks - (n + 1) / 2) if marks else 1.0
        if "inhibit" in on and weight < 1 or "enhance" in on and weight > 1:
            new[1 + i] = weight * new[1 + i]
    return torch.stack(new)


def cross_entropy(features, class_weights, labels, scale):
    """Mean over features (B, embed); all of unit length."""
    return -sum((scale * class_weights @ f).log_softmax(0)[y] for f, y in zip(features, labels)) / len(labels)


def relation_loss(relation, last, texts, labels, plain_labels, c, r):
    """RA: A_v (B, K) towards what it was a step before and, as c falls from 1 to 0, what the texts say."""
    loss = 0
    for m, label in enumerate(labels):
        of_text = torch.stack([texts[label] @ texts[other] for other in plain_labels])
        now, fused = relation[m], c * last[m] + (1 - c) * of_text
        if r.ra == "released":
            loss = loss + (fused.exp() * (fused - now)).mean()
        else:
            loss = loss + (now.softmax(0) * (now.log_softmax(0) - fused.log_softmax(0))).sum()
    return loss / len(labels)


def adapt(clip, batches, support, labels, ids, method, r, lora_A, picks):
    """One episode -> losses (steps,), and a function of pictures (Q, 3, S, S) that gives logits (Q, N).

    batches(step): pictures (B, 3, S, S) and labels (B,). support (M, 3, S, S), labels (M,): the plain ones.
    ids (N, T); lora_A {layer: (rank, in)}: first values; picks (steps, N): the rows that SVL draws.
    """
    on = {half for name in f"{method}+{r.tune}".split("+") for half in HALVES.get(name, name).split()}
    frozen = {name: p.detach() for name, p in clip.named_parameters()}
    A = {name: a.clone().requires_grad_() for name, a in lora_A.items()}
    B = {name: a.new_zeros(len(frozen[name + ".weight"]), r.rank).requires_grad_() for name, a in A.items()}
    context = frozen["token_embedding.weight"][ids[0, 1: 1 + r.context]].requires_grad_("coop" in on)
    layers = clip.config.vision_layers
    alpha, beta = context.new_zeros(layers), context.new_full([layers], r.beta * ("push" in on))
    alpha[r.alpha_block * layers // 12] = r.alpha * ("pull" in on)
    alpha.requires_grad_("pull" in on)
    beta.requires_grad_("push" in on)
    of_lora = {"params": [*A.values(), *B.values()], "lr": r.lr}
    adamw = torch.optim.AdamW([of_lora], weight_decay=r.weight_decay)
    sgd = torch.optim.SGD([context], r.context_lr, momentum=0.9, weight_decay=5e-4)
    (sgd if r.sgd else adamw).add_param_group({"params": [alpha, beta], "lr": r.token_lr})

    def encode_texts():
        """Weights as they are now, class texts of unit length, and those that ATHA and TIR take."""
        w = dict(frozen)
        for name in A:
            w[name + ".weight"] = w[name + ".weight"] + r.lora_alpha / math.sqrt(r.rank) * B[name] @ A[name]
        of_blocks = [encode_text(w, row, context, clip.config.text_layers) for row in ids]
        early = r.text_block * clip.config.text_layers // 12
        last, hook_texts = (torch.stack([features[i] for features in of_blocks]) for i in (-1, early))
        return w, F.normalize(last, dim=1), hook_texts

    def encode(w, pictures, texts):
        return torch.stack([encode_picture(w, picture, texts, alpha, beta, r, on) for picture in pictures])

    losses, last = [], None
    for step in range(r.steps):
        pictures, wanted = batches(step)
        w, texts, hook_texts = encode_texts()
        features, progress = encode(w, pictures, hook_texts), step / (r.extra_share * r.steps)
        loss = cross_entropy(features, texts, wanted, r.scale)
        if "svl-only" in on and progress < 1:
            weight = 0.1 if features.requires_grad else 0.001             # vision learns, or text alone
            loss = loss + weight * cross_entropy(features, features[picks[step]], wanted, r.scale)
        if "ra-only" in on and progress < 1:
            relation = features @ encode(w, support, hook_texts).T
            if r.minibatch:                                               # of other pictures than the last
                last = relation.detach()
            if last is not None:
                of_ra = relation_loss(relation, last, texts, wanted, labels, 1 - progress, r)
                loss = loss + r.ra_weight * of_ra
            last = relation.detach()
        adamw.zero_grad()
        sgd.zero_grad()
        loss.backward()
        adamw.step()
        sgd.step()
        losses.append(loss.detach())
    w, texts, hook_texts = encode_texts()
    return torch.stack(losses), lambda pictures: r.scale * encode(w, pictures, hook_texts) @ texts.T
