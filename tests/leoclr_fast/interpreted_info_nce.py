"""Runs the Triton loss in Triton's interpreter: ``TRITON_INTERPRET=1 python -m ... CASES.pt RESULTS.pt``.

A process of its own, since Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from leoclr_fast.losses.info_nce import info_nce


def run(case: dict[str, Any]) -> dict[str, Any]:
    """loss, gradient, and whether a second run, if the case asks for one, gave the same bits; or error."""
    query, keys, queue = case["query"].requires_grad_(), case["keys"], case["queue"].requires_grad_()
    results = []
    for _ in range(2 if case.get("twice") else 1):
        try:
            loss = info_nce(query, [key.requires_grad_() for key in keys], queue, case["temperature"], "triton")
        except ValueError as error:
            return {"error": str(error)}
        (loss * case["loss_scale"]).backward()
        results.append((loss.detach(), query.grad))
        query.grad = None
    (loss, gradient), *others = results
    return {
        "loss": loss,
        "gradient": gradient,
        "others_got_none": queue.grad is None and all(key.grad is None for key in keys),
        "repeatable": all(torch.equal(loss, again) and torch.equal(gradient, other) for again, other in others)
        if others
        else None,
    }


if __name__ == "__main__":
    cases = torch.load(sys.argv[1])
    torch.save({name: run(case) for name, case in cases.items()}, sys.argv[2])
