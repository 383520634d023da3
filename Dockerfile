# e2a itself, for compose.yaml: one image, a role a container. The sandboxes' image is another one, which the node
# process builds (sandboxes/images).
#   docker build -t e2a .
# Where the default base cannot be had, any Debian 12 will do: --build-arg BASE=...
ARG BASE=debian:bookworm-slim
FROM ${BASE}

# e2fsprogs: the node process formats the sandboxes' disks. debootstrap: it makes their base image when the registry
# does not answer.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates debootstrap e2fsprogs mount python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/e2a
COPY requirements.txt ./
RUN python3 -m venv .venv && .venv/bin/python -m pip install --no-cache-dir --requirement=requirements.txt
ENV PATH=/opt/e2a/.venv/bin:$PATH
COPY package.json package-lock.json ./
RUN npm ci --ignore-scripts --no-audit --no-fund
COPY . .

# The pages' files are part of the image. Role beat, since collecting needs no secret.
ENV PYTHONUNBUFFERED=1 E2A_ENV=production E2A_DATA_DIR=/data
RUN python -m compileall -q . \
 && useradd --system --uid 9999 --home-dir /data --create-home e2a \
 && E2A_ROLE=beat python manage.py collectstatic --noinput --verbosity 0 \
 && mkdir -p /data/run /data/snapshots && chown -R e2a: /data
USER e2a
