"""Compression jobs: durable, one at a time, in a worker process of their own.

API process                     worker process                   child process
client.py  --enqueue--> DBOS --> workflow.py --spawns--> child.py -> onebit quantize, onebit evaluate
           <--status, events--              <--JSON lines-- process.py
supervisor.py keeps the worker alive; loader.py serves what a job made
"""
