//! Where guest systems come from: the Debian archive, initial RAM disks.
#![forbid(unsafe_code)]
