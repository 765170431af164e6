//! A VPC, EC2 and IMDS on one machine, with real packets in network namespaces.
