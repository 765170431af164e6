//! The kernel: rtnetlink, nf_tables, conntrack, namespaces, sysctls. Knows nothing of pods or AWS.
