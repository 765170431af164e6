//! Limits of the instance types (`spec/aws.md` 15, appendix A).
