//! AWS: IMDS, credentials, signing, the EC2 Query API (`spec/aws.md`). Knows only `model`.
