# A stand-in for the official image of PostgreSQL, made of Debian's package: the same variables, user and folder.
ARG BASE
FROM ${BASE}
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends postgresql && rm -rf /var/lib/apt/lists/* \
    && install -d -o 999 -g 999 -m 0700 /var/lib/postgresql/data && echo 'db:x:999:999::/tmp:/bin/sh' >> /etc/passwd
COPY tests/deploy/images/database-start /usr/local/bin/
ENTRYPOINT ["database-start"]
