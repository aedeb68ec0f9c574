//! A region round each call of a subscriber.

use super::Guarded;
use super::thread_end::{number_for_spans, number_for_values};
use crate::{NoForking, no_forking};
use std::any::TypeId;
use tracing_core::span::{Attributes, Current, Id, Record};
use tracing_core::{Dispatch, Event, Interest, LevelFilter, Metadata, Subscriber};

/// Every call is made inside one region, and what the registry does at a thread's end is done inside another.
impl<S: Subscriber> Subscriber for Guarded<S> {
    fn on_register_dispatch(&self, dispatch: &Dispatch) {
        let _region = region();
        self.0.on_register_dispatch(dispatch);
    }

    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        let _region = region();
        self.0.register_callsite(metadata)
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let _region = region();
        self.0.enabled(metadata)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        let _region = region();
        self.0.max_level_hint()
    }

    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let _region = region();
        number_for_spans();
        self.0.new_span(attributes)
    }

    fn record(&self, span: &Id, values: &Record<'_>) {
        let _region = region();
        self.0.record(span, values);
    }

    fn record_follows_from(&self, span: &Id, follows: &Id) {
        let _region = region();
        self.0.record_follows_from(span, follows);
    }

    fn event_enabled(&self, event: &Event<'_>) -> bool {
        let _region = region();
        self.0.event_enabled(event)
    }

    fn event(&self, event: &Event<'_>) {
        let _region = region();
        self.0.event(event);
    }

    fn enter(&self, span: &Id) {
        let _region = region();
        self.0.enter(span);
    }

    fn exit(&self, span: &Id) {
        let _region = region();
        self.0.exit(span);
    }

    fn clone_span(&self, id: &Id) -> Id {
        let _region = region();
        self.0.clone_span(id)
    }

    #[allow(deprecated)]
    fn drop_span(&self, id: Id) {
        let _region = region();
        number_for_spans();
        self.0.drop_span(id);
    }

    fn try_close(&self, id: Id) -> bool {
        let _region = region();
        number_for_spans();
        self.0.try_close(id)
    }

    fn current_span(&self) -> Current {
        let _region = region();
        self.0.current_span()
    }

    #[allow(unsafe_code)]
    unsafe fn downcast_raw(&self, id: TypeId) -> Option<*const ()> {
        if id == TypeId::of::<Self>() {
            return Some(std::ptr::from_ref(self).cast());
        }
        let _region = region();
        // SAFETY: our caller's promise is the one that the subscriber asks for; what it points to lives as long as it, and that is in us.
        unsafe { self.0.downcast_raw(id) }
    }
}

#[inline]
fn region() -> NoForking {
    let region = no_forking();
    number_for_values();
    region
}
