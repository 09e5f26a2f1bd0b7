//! Prints whether this host's KVM can run guests.
fn main() {
    match kvm::probe() {
        Ok(usable) => println!("usable: {usable:?}"),
        Err(unusable) => println!("unusable: {}\nhelp: {}", unusable.reason, unusable.remedy),
    }
}
