"""Hoisting: what of a denoiser does not depend on the latents leaves its graphs, and is computed before the loop.

    before  full(latents, timestep, text):   k = text @ Wk;   m = silu(time(timestep)) @ Wm;   ... attention(q, k) * m
    after   prologue(text):                  k = text @ Wk                                     once a picture
            step(timesteps):                 m = silu(time(timesteps)) @ Wm                    for many evaluations at once
            full(latents, k, m):             ... attention(q, k) * m                           at every evaluation

No family has a word in it: inputs are known by name, and the rest is what depends on what. `hoist.py` is the pass; it asks
`values.py` for the values of all variants, equal ones once, `cut.py` which of them to pass to the loop, and `split.py` for
the graphs; `evaluations.py` makes the step's graph one of many evaluations.
"""
