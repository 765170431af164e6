//! All environment variables in one table (`spec/config.md`).
