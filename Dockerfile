# pdctl as an image: docs/image.md says how to build, run and check it.
#
#   docker build -t pdctl .                                     the registry; agents and ranks in host memory
#   docker build -t pdctl:cuda12 --build-arg WHEEL=cuda12 .     with Mooncake for CUDA 12 (or cuda13)
#
# ./dev image-check builds it twice without a daemon, compares every file, and runs it.

# The base by digest: the tag says what it is, the digest what is taken.
ARG BASE=debian:bookworm-20260824-slim@sha256:88200866dfff7ea7f5cbcb6ec7c8a701889efe6fe859fe64d6990e4b07ea4171

# --- what both stages stand on: the interpreter, and what Mooncake's libraries link to and its wheel does not carry
FROM ${BASE} AS system
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# today: Debian's packages with the fixes of today. snapshot: as they were when the base was made, which names the
# archive of that moment in a comment above each URI; with it nothing in the image depends on the day of the build.
ARG PACKAGES=today

# Versions are the archive's: one that is fixed would be gone from the mirrors with the next security fix.
# hadolint ignore=DL3008
RUN case "$PACKAGES" in \
      today) ;; \
      snapshot) sed -i '/^# http/{N;s|^# \(http[^\n]*\)\n.*|URIs: \1|}' /etc/apt/sources.list.d/debian.sources; \
        echo 'Acquire::Check-Valid-Until "false";' >/etc/apt/apt.conf.d/snapshot ;; \
      *) echo "PACKAGES is $PACKAGES: say today or snapshot" >&2; exit 1 ;; \
    esac; \
    apt-get update; \
    apt-get install -y --no-install-recommends python3.11 libibverbs1 ibverbs-providers libnuma1 libcurl4; \
    rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/* /var/log/*; \
    find / -xdev -type f -perm /6000 -exec chmod ug-s {} + # nothing in the image gains rights by being started

# --- the environment, from the lock
FROM system AS build

# hadolint ignore=DL3008
RUN apt-get update; \
    apt-get install -y --no-install-recommends python3.11-venv; \
    rm -rf /var/lib/apt/lists/*

WORKDIR /build
COPY deploy/lock/ lock/

# Which Mooncake: cpu, cuda12 or cuda13. The CUDA runtime is in the lock, the driver comes from the host.
ARG WHEEL=cpu

# A package index of your own: --secret id=pip,src=pip.conf. It stays out of the image.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3.11 -m venv tools; \
    python3.11 -m venv --without-pip /opt/pdctl; \
    tools/bin/pip install --no-cache-dir --require-hashes -r lock/build.txt; \
    tools/bin/pip --python /opt/pdctl/bin/python install --no-cache-dir --no-compile \
      --require-hashes -r "lock/image-$WHEEL.txt"

COPY pyproject.toml README.md LICENSE ./
COPY pdctl/ pdctl/

# 60 MB that nothing here runs go: Mooncake's own benchmark and numpy's tests. Bytecode is made by content: else it
# carries the time of day (-f: pip has begun with it).
RUN tools/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist .; \
    tools/bin/pip --python /opt/pdctl/bin/python install --no-cache-dir --no-compile --no-deps --no-index dist/*.whl; \
    rm /opt/pdctl/lib/python3.11/site-packages/mooncake/transfer_engine_bench /opt/pdctl/bin/transfer_engine_bench; \
    find /opt/pdctl/lib/python3.11/site-packages/numpy -type d -name tests -prune -exec rm -rf {} +; \
    /opt/pdctl/bin/python -m compileall -qf --invalidation-mode unchecked-hash /opt/pdctl/lib

# --- what runs
FROM system

LABEL org.opencontainers.image.title="pdctl" \
      org.opencontainers.image.description="The control plane for prefill/decode disaggregated LLM serving" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.documentation="docs/image.md"

# Given by who builds: --build-arg VERSION=0.1.0 --build-arg REVISION="$(git rev-parse HEAD)"
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

COPY --from=build /opt/pdctl/ /opt/pdctl/
COPY --chmod=0755 deploy/image/alive.py /opt/pdctl/bin/alive

# The only place that is written to. Numbers and no names: no file changes but this folder.
RUN install -d -o 65532 -g 65532 -m 0750 /var/lib/pdctl
ENV PATH=/opt/pdctl/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/lib/pdctl \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /var/lib/pdctl
WORKDIR /var/lib/pdctl
USER 65532:65532

EXPOSE 8998
HEALTHCHECK --interval=10s --timeout=3s --start-period=15s --retries=3 CMD ["alive"]
ENTRYPOINT ["pdctl"]
CMD ["serve", "--host", "0.0.0.0"]
