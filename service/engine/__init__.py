"""The inference engine: one process for one loaded model, and the asyncio face the server talks to.

Read `types` (what crosses the border), `client` (the server's side), `loop` (the whole engine on one screen), then the
verbs the loop uses: `scheduler` and `page_allocator` (no tensors), `batch`, `runner`, `attention`, `kv_cache`,
`sampling`, and `completion` with `stopping` and `detokenizer`.
"""
