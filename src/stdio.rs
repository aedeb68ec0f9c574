//! x
pub(crate) fn panics_by_write(){} pub(crate) fn in_spawned_child(){} pub(crate) fn is_guarded()->bool{false}
/// x
pub fn guard()->crate::Registration { crate::register(crate::Hook::new("x")) }
