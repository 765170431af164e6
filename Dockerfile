# The images of the aws-node DaemonSet: `node` for its main container, `init` for its init container. docs/image.md
#
#   docker build --target node .                                      everything is built here, from a Rust image
#   packaging/image/build && docker build --target node --build-arg TREES=given -f Dockerfile target/image
#                                                                     from what was built outside; no base image, no network
#
# BuildKit is needed, as in every Docker since version 23 (`DOCKER_BUILDKIT=1` before): it leaves out the stages that the
# target does not come from.

# Where the file trees come from: `built` or `given`.
ARG TREES=built
# A Rust of Cargo.toml's version at least, with a C compiler, on a distribution with glibc.
ARG RUST=docker.io/library/rust:1.95-bookworm
# The reference plugins that the init image brings along, with `built`: an image or a stage, and the folder in it.
ARG PLUGINS=no-plugins
ARG PLUGINS_FOLDER=/

FROM scratch AS no-plugins

FROM ${PLUGINS} AS plugins

FROM ${RUST} AS build
ARG PLUGINS_FOLDER
ARG SOURCE_DATE_EPOCH
WORKDIR /enibox
COPY . .
COPY --from=plugins ${PLUGINS_FOLDER} /plugins/
RUN SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-0} packaging/image/build --plugins /plugins

# One copy of a folder keeps the hard links in it.
FROM scratch AS node-built
COPY --from=build /enibox/target/image/node/ /

FROM scratch AS init-built
COPY --from=build /enibox/target/image/init/ /

# An archive is unpacked with its hard links by any builder.
FROM scratch AS node-given
ADD node.tar /

FROM scratch AS init-given
ADD init.tar /

FROM node-${TREES} AS node
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="enibox" \
      org.opencontainers.image.description="The Amazon VPC CNI for Kubernetes as one static executable: daemon, plugins, probe" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
# For `kubectl exec -n kube-system ds/aws-node -- enibox status`.
ENV PATH=/app
WORKDIR /app
ENTRYPOINT ["/app/aws-vpc-cni"]

FROM init-${TREES} AS init
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="enibox-init" \
      org.opencontainers.image.description="Init container of the Amazon VPC CNI for Kubernetes: reference plugins and the node's settings" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
ENV PATH=/init
WORKDIR /init
ENTRYPOINT ["/init/aws-vpc-cni-init"]
