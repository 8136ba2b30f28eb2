"""A queue in Redis that embedding workers share: see docs/distributed.md.

`serving/queue_client.py` puts requests in, `worker.py` computes them. What happens to an item, and when, is written in
the Lua scripts of this folder, each of which Redis runs as a whole; `common.lua` states what they keep true.
"""
