"""Random kills of everything while jobs run and users ask: `make chaos`.

    clients --> nginx --> 2 servers (an engine each) --> PostgreSQL <-- 2 workers (a child with each job)
                              ^            ^                 ^              ^          ^
                              +------------+------ SIGKILL --+--------------+----------+   and SIGSTOP for a worker

Everything is real and a process of its own. What dies is started again after a moment, as a cluster would do it;
engines and children nobody starts but their parents. Clients know what each answer must be. In the end every job that
was posted must be there once and have succeeded, with an artifact whose bytes are those of an undisturbed run, and no
answer may have been wrong: refused or cut off is allowed while something is dead, another text never is.
"""
