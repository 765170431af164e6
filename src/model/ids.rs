//! Names that AWS and the container runtime give to things. Distinct types, so that an ENI's id cannot stand where a
//! subnet's is wanted.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl $name {
            /// The text of the id.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                $name(text.to_owned())
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                $name(text)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// An elastic network interface, `eni-0123…`.
    EniId
);
id!(
    /// The attachment of an ENI to an instance, `eni-attach-0123…`.
    AttachmentId
);
id!(
    /// An instance, `i-0123…`.
    InstanceId
);
id!(
    /// A subnet, `subnet-0123…`.
    SubnetId
);
id!(
    /// A VPC, `vpc-0123…`.
    VpcId
);
id!(
    /// A security group, `sg-0123…`.
    GroupId
);

/// What an address is given to: one interface of one sandbox in one network (`spec/plugin.md` 8.2). The daemon answers a
/// repeated key with the same address.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodKey {
    /// Name of the CNI network, `aws-cni`.
    pub network: String,
    /// The runtime's sandbox id.
    pub container: String,
    /// Interface in the pod, `eth0`.
    pub ifname: String,
}

impl fmt::Display for PodKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.network, self.container, self.ifname)
    }
}

/// A Kubernetes pod by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodName {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}
