//! The host's KVM as an engine.
