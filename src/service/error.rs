//! Why a service does not take a message.

use std::fmt;
use std::io;

/// Why a [`Service`](crate::Service) did not do what was asked of it.
#[derive(Debug)]
#[non_exhaustive]
pub enum ServiceError {
    /// The channel has no room now; on the service's own thread, where waiting for room would be for ever, also from `send`.
    Full {
        /// Its name.
        service: &'static str,
    },
    /// It was stopped, here or before the fork.
    Stopped {
        /// Its name.
        service: &'static str,
    },
    /// Its handler panicked; the message that it had, and what was queued, are lost.
    Panicked {
        /// Its name.
        service: &'static str,
    },
    /// A child in which it does not run: declared [`OnChild::Nothing`](crate::OnChild::Nothing), or a child that has not cleaned up:
    /// see [`InChild::cleanup`](crate::InChild::cleanup) and [`postfork_child_noexec`](crate::postfork_child_noexec).
    NotRestarted {
        /// Its name.
        service: &'static str,
    },
    /// A child of a fork that came in the middle of a message: a dirty one (see [`lineage`](crate::lineage())), or one made by the handler
    /// itself. The state cannot be handed over.
    StateLost {
        /// Its name.
        service: &'static str,
    },
    /// A call was not answered: the handler dropped its [`Reply`](crate::Reply).
    NoReply {
        /// Its name.
        service: &'static str,
    },
    /// Called by the service's own thread, which would wait for itself.
    OwnThread {
        /// Its name.
        service: &'static str,
    },
    /// The thread could not be started.
    Os {
        /// Its name.
        service: &'static str,
        /// EAGAIN: limits on threads.
        error: io::Error,
    },
}

impl fmt::Display for ServiceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServiceError::Full { service } => write!(f, "service \"{service}\": the channel is full"),
            ServiceError::Stopped { service } => write!(f, "service \"{service}\" was stopped"),
            ServiceError::Panicked { service } => write!(f, "service \"{service}\" ended: its handler panicked"),
            ServiceError::NotRestarted { service } => write!(
                f,
                "service \"{service}\" does not run in this child: it is declared so (OnChild::Nothing), or the child did not clean up \
                 (InChild::cleanup, postfork_child_noexec)"
            ),
            ServiceError::StateLost { service } => {
                write!(
                    f,
                    "service \"{service}\": the fork came in the middle of a message, its state cannot be handed over"
                )
            }
            ServiceError::NoReply { service } => write!(f, "service \"{service}\": the handler did not answer"),
            ServiceError::OwnThread { service } => {
                write!(f, "service \"{service}\": its own thread would wait for itself; use send in the handler")
            }
            ServiceError::Os { service, error } => write!(f, "service \"{service}\": no thread: {error}"),
        }
    }
}

impl std::error::Error for ServiceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ServiceError::Os { error, .. } => Some(error),
            _ => None,
        }
    }
}

/// A message that was not sent, and why.
pub struct SendError<M> {
    /// The message.
    pub message: M,
    /// Why.
    pub error: ServiceError,
}

impl<M> fmt::Debug for SendError<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendError").field("error", &self.error).finish_non_exhaustive()
    }
}

impl<M> fmt::Display for SendError<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<M> std::error::Error for SendError<M> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

/// Drops the message.
impl<M> From<SendError<M>> for ServiceError {
    fn from(e: SendError<M>) -> Self {
        e.error
    }
}
