use super::*;

#[test]
fn reset_control_wants_an_edge() {
    let power = Power::default();
    let control = Control::new(power.clone());
    control.write(0, 1, 2);
    assert_eq!(power.requested(), None);
    control.write(0, 1, 6);
    assert_eq!(power.requested(), Some(End::Reset));
    assert_eq!(control.read(0, 1), 6);
    power.clear();
    control.write(0, 1, 6);
    assert_eq!(power.requested(), None);
    let fast = FastA20::new(power.clone());
    fast.write(0, 1, 2);
    assert_eq!((fast.read(0, 1), power.requested()), (2, None));
    fast.write(0, 1, 3);
    assert_eq!(power.requested(), Some(End::Reset));
}
