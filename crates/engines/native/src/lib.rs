//! Runs one unprivileged compute instruction on the host's processor.
